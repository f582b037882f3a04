//! Slots as wholes: copies of them, and how much of a stream they keep.
//!
//! Copies: 1. the pairs, copied; 2. `copy_slots`. Taking tokens back: 1. the counters, copied.

use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Bytes, Operand, Requirement};
use crate::cuda::plan::allocation::{Allocation, PART_ALIGN};
use crate::cuda::plan::effect::{Change, Copied, Effect};
use crate::cuda::plan::kernel::Arch;
use crate::cuda::plan::kernels::find;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::*;
use crate::cuda::plan::problem::problem_params;
use crate::error::{Error, Result};
use crate::memory::slots::{check_pairs, check_pairs_within};

/// Plans that slots of `to`, at [`Operand::State`], continue where slots of `from`, at
/// [`Operand::Source`]`(0)`, stand: `pairs` are (slot of `from`, slot of `to`). A slot of `from` may be
/// named several times; a run that was broken off in a slot of `to` is over then. The two may have
/// different numbers of slots and room for rotated keys or not. `from` must stay as it is until the plan
/// has run, and is another allocation ([`plan_copy_within`]).
///
/// # Errors
/// [`Error::Problem`] for states of different problems; [`Error::Value`] for a slot out of range, a slot
/// of `to` named twice, and one without room for the rotated keys of an open segment;
/// [`Error::Unfinished`] for a slot of `from` in which a run was broken off.
pub fn plan_copy_slots(from: &Mirror, to: &Mirror, pairs: &[(usize, usize)]) -> Result<Plan> {
    from.problem().check_same(to.problem())?;
    let copied = copied(from, to, pairs)?;
    let (operand, after) = (Operand::Source(0), from.layout().bytes());
    let requirement = Requirement { operand, align: PART_ALIGN, before: 0, after };
    plan_copies(from.layout().symbols_at(operand), to, copied, pairs, vec![requirement])
}

/// The same within one state: `pairs` are (slot, slot that becomes its copy).
///
/// # Errors
/// Those of [`plan_copy_slots`], and [`Error::Value`] for a slot that is to be copied and to become a
/// copy.
pub fn plan_copy_within(state: &Mirror, pairs: &[(usize, usize)]) -> Result<Plan> {
    check_pairs_within(pairs, state.layout().slots())?;
    let mut copied = copied(state, state, pairs)?;
    copied.iter_mut().zip(pairs).for_each(|(copied, (from, _))| copied.from = Some(*from));
    plan_copies(state.layout().symbols(), state, copied, pairs, Vec::new())
}

/// Every pair, with the counters that its slot gets.
fn copied(from: &Mirror, to: &Mirror, pairs: &[(usize, usize)]) -> Result<Vec<Copied>> {
    check_pairs(pairs, from.layout().slots(), to.layout().slots())?;
    for (i, (source, _)) in pairs.iter().enumerate() {
        let room = format_args!("pairs[{i}] (source {source}, its open segment with rotation)");
        to.check_room(&from.counters()[*source], room)?;
    }
    from.check_finished(pairs.iter().map(|(source, _)| *source))?;
    let copied = |&(source, to): &(usize, usize)| Copied {
        from: None,
        to,
        counters: from.counters()[source],
    };
    Ok(pairs.iter().map(copied).collect())
}

fn plan_copies(
    from: InfiniState,
    to: &Mirror,
    copied: Vec<Copied>,
    pairs: &[(usize, usize)],
    requirements: Vec<Requirement>,
) -> Result<Plan> {
    /// Pairs per launch: a grid's z.
    const MOST: usize = 65_535;
    /// Blocks of a pair and KV head at most; they stride over what is left.
    const BLOCKS: usize = 64;
    let (p, layout) = (to.problem(), to.layout());
    let title = format!("copy {} slots; {}", pairs.len(), p.shapes());
    let mut plan = Plan::new(title, layout, Effect::Copy(copied));
    let mut workspace = Allocation::new(Operand::Workspace);
    // Slots are less than 2^31.
    let pair = |&(from, to): &(usize, usize)| InfiniSlotPair { from: from as i32, to: to as i32 };
    let table: Vec<_> = pairs.iter().map(pair).collect();
    let at = workspace.part(&[table.len()], size_of::<InfiniSlotPair>())?;
    plan.copy(at, Bytes::plain(&table));
    let kernel = find("copy_slots", p, Arch::Sm80)?;
    let largest = (4 * p.key_dim() * p.value_dim())
        .max(p.segment_len() * p.dtype().bytes() * p.key_dim().max(p.value_dim()));
    let blocks = largest.div_ceil(kernel.threads as usize * 4 * 16).min(BLOCKS);
    for first in (0..pairs.len()).step_by(MOST) {
        let count = MOST.min(pairs.len() - first);
        let params = InfiniCopySlots {
            problem: problem_params(p),
            from,
            to: layout.symbols(),
            pairs: at + (first * size_of::<InfiniSlotPair>()) as u64,
        };
        let why = format!("slots: {count}; blocks per KV head: {blocks}");
        plan.launch(kernel, [blocks, p.kv_heads(), count], params, why)?;
    }
    Ok(plan.finish(requirements, &workspace))
}

/// Plans that a slot forgets all but the first `tokens` tokens of its stream: those of a draft that were
/// rejected. Only tokens of the open segment can be taken back.
///
/// # Errors
/// [`Error::Value`] for a slot out of range, and for more tokens than it has seen; [`Error::Committed`]
/// for fewer than came before its open segment; [`Error::Unfinished`].
pub fn plan_truncate(state: &Mirror, slot: usize, tokens: u64) -> Result<Plan> {
    let (p, layout) = (state.problem(), state.layout());
    if slot >= layout.slots() {
        let expected = format!("less than the state's {} slots", layout.slots());
        return Err(Error::value("slot", slot, expected));
    }
    state.check_finished([slot])?;
    let found = state.counters()[slot];
    let after = found.truncated(slot, tokens)?;
    let title = format!("keep {tokens} of {} tokens; {}", found.tokens, p.shapes());
    let mut plan = Plan::new(title, layout, Effect::Set(vec![Change { slot, found, after }]));
    if after != found {
        layout.set_counters(&mut plan, slot, &[after]);
    }
    Ok(plan.finish(Vec::new(), &Allocation::new(Operand::Workspace)))
}
