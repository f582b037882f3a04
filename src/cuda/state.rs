//! A pool of states in device memory: one allocation, and a mirror of its counters on the host.

use super::address::{Bytes, Parameters};
use super::call::shapes;
use super::params::*;
use super::plan::{Allocation, Plan};
use super::{Addresses, Arch, Operand, find};
use crate::call::{Sequence, check_continued, check_slots, pieces};
use crate::memory::Counters;
use crate::{Error, Problem, Result};

/// Where the parts of a pool of states lie in one allocation, each at a multiple of 256 bytes:
/// memory and normaliser, the 16-bit form of the memory that retrievals read, open segments,
/// counters, status word, and the tickets that blocks exchange.
///
/// ```no_run
/// use infini_attn::{DType, Problem, cuda::StateLayout};
/// let problem = Problem::builder().head_dim(128).dtype(DType::BF16).build()?;
/// let layout = StateLayout::new(&problem, 64, true)?;
/// let memory = layout.params(0x7f00_0000_0000).memory; // of an allocation of layout.bytes()
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct StateLayout {
    problem: Problem,
    slots: usize,
    rotation: bool,
    bytes: u64,
    /// Symbols, as those of the tickets.
    state: InfiniState,
    head_tickets: u64,
    sequence_tickets: u64,
}

impl PartialEq for StateLayout {
    fn eq(&self, other: &Self) -> bool {
        // Everything else follows from these.
        (&self.problem, self.slots, self.rotation) == (&other.problem, other.slots, other.rotation)
    }
}

impl StateLayout {
    /// The layout of `slots` states; `rotation`: with room for rotated keys, which a call with
    /// [`rope`](super::Call::rope) needs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when no kernels are compiled for the problem, [`Error::Value`] for more
    /// than 2^31 − 1 slots or 2^47 bytes.
    pub fn new(problem: &Problem, slots: usize, rotation: bool) -> Result<Self> {
        find("segment_attention", problem, Arch::Sm80)?;
        if i32::try_from(slots).is_err() {
            return Err(Error::value("slots", slots, format!("at most {}", i32::MAX)));
        }
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        let (n, t) = (problem.segment_len(), problem.dtype().bytes());
        let scales = dv / INFINI_SCALE_COLUMNS as usize;
        let mut all = Allocation::new(Operand::State);
        let state = InfiniState {
            memory: all.part(&[slots, h, dk, dv], 4)?,
            normalizer: all.part(&[slots, h, dk], 4)?,
            snapshot: all.part(&[slots, h, dk, dv], t)?,
            snapshot_scale: all.part(&[slots, h, scales], 4)?,
            open_k: all.part(&[slots, h, n, dk], t)?,
            open_k_rotated: if rotation { all.part(&[slots, h, n, dk], t)? } else { 0 },
            open_v: all.part(&[slots, h, n, dv], t)?,
            counters: all.part(&[slots], size_of::<InfiniCounters>())?,
            status: all.part(&[1], 4)?,
            slots: slots as i64,
        };
        let (head_tickets, sequence_tickets) =
            (all.part(&[slots, h, problem.group()], 4)?, all.part(&[slots], 4)?);
        let (problem, bytes) = (*problem, all.bytes());
        Ok(Self { problem, slots, rotation, bytes, state, head_tickets, sequence_tickets })
    }

    /// The problem its states belong to.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Whether there is room for rotated keys.
    pub fn rotation(&self) -> bool {
        self.rotation
    }

    /// Bytes of the allocation; its address must be a multiple of 256.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The addresses of every part in an allocation at `address`; with 0 their offsets. Rotated keys
    /// without room are absent, 0.
    pub fn params(&self, address: u64) -> InfiniState {
        let addresses = Addresses::new().with(Operand::State, address);
        let mut state = self.state;
        state.addresses(&mut |symbol| *symbol = addresses.resolve(*symbol));
        state
    }

    /// The same as symbols.
    pub(crate) fn symbols(&self) -> InfiniState {
        self.state
    }

    /// Tickets of this state, with `partials` of a workspace. A call has no more sequences than the
    /// state has slots.
    pub(crate) fn exchange(&self, partials: u64) -> InfiniExchange {
        let (head_tickets, sequence_tickets) = (self.head_tickets, self.sequence_tickets);
        InfiniExchange { partials, head_tickets, sequence_tickets }
    }

    /// The plan that makes an allocation a pool of empty states: everything 0, snapshot scales 1.
    /// Run it before any other.
    ///
    /// # Errors
    /// [`Error::Unsupported`], as [`Self::new`].
    pub fn plan_init(&self) -> Result<Plan> {
        let title = format!("init {}; slots: {}", shapes(&self.problem), self.slots);
        let mut plan = Plan::new(title, self, Effect::Reset((0..self.slots).collect()));
        plan.fill(Operand::State.at(0), self.bytes, 0);
        self.snapshots(&mut plan, 0, self.slots)?;
        Ok(plan.finish(Vec::new(), &Allocation::new(Operand::Workspace)))
    }

    /// The plan that makes the given slots forget everything they have seen.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range or named twice.
    pub fn plan_reset(&self, slots: &[usize]) -> Result<Plan> {
        check_slots(slots, self.slots)?;
        let p = &self.problem;
        let title = format!("reset {}; slots: {} of {}", shapes(p), slots.len(), self.slots);
        let mut plan = Plan::new(title, self, Effect::Reset(slots.to_vec()));
        let z = (4 * p.kv_heads() * p.key_dim()) as u64;
        let parts = [
            (self.state.memory, z * p.value_dim() as u64),
            (self.state.normalizer, z),
            (self.state.counters, size_of::<InfiniCounters>() as u64),
        ];
        for &slot in slots {
            for (symbol, bytes) in parts {
                plan.fill(symbol + slot as u64 * bytes, bytes, 0);
            }
            self.snapshots(&mut plan, slot, 1)?;
        }
        Ok(plan.finish(Vec::new(), &Allocation::new(Operand::Workspace)))
    }

    /// Writes the counters of every slot.
    pub(crate) fn set_counters(&self, plan: &mut Plan, counters: &[Counters]) {
        let counters = counters.iter().map(|c| InfiniCounters {
            tokens: c.tokens,
            committed: c.committed,
            open_len: c.open_len as u32,
            rotated: c.rotated.into(),
            taken: 0,
            reserved: 0,
        });
        plan.copy(self.state.counters, Bytes::plain(&counters.collect::<Vec<_>>()));
    }

    /// Launches that make the snapshots of `count` slots from `first` on from their memories.
    pub(crate) fn snapshots(&self, plan: &mut Plan, first: usize, count: usize) -> Result<()> {
        /// Memories per launch: a grid's y.
        const MOST: usize = 65_535;
        let p = &self.problem;
        let (dk, dv, t) = (p.key_dim(), p.value_dim(), p.dtype().bytes());
        let scales = dv / INFINI_SCALE_COLUMNS as usize;
        let end = (first + count) * p.kv_heads();
        for at in (first * p.kv_heads()..end).step_by(MOST) {
            let matrices = MOST.min(end - at);
            let params = InfiniSnapshot {
                memory: self.state.memory + (at * dk * dv * 4) as u64,
                snapshot: self.state.snapshot + (at * dk * dv * t) as u64,
                snapshot_scale: self.state.snapshot_scale + (at * scales * 4) as u64,
                matrices: matrices as i64,
                key_dim: dk as i32,
                value_dim: dv as i32,
            };
            let why = format!("snapshots and scales; memories: {matrices}");
            plan.launch(find("snapshot", p, Arch::Sm80)?, [scales, matrices, 1], params, why)?;
        }
        Ok(())
    }
}

/// What a run changes in the counters.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    /// Nothing: no state is touched.
    None,
    /// Every slot's counters change from what was found when it was planned.
    Set(Vec<(Counters, Counters)>),
    /// Slots are emptied.
    Reset(Vec<usize>),
    /// Open segments are committed. With the counters found when it was planned.
    Flush(Vec<(usize, Counters)>),
    /// Sequences bring new tokens.
    Tokens(Tokens),
}

#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    /// Slot and new tokens of every sequence.
    pub sequences: Vec<(usize, usize)>,
    /// Rows of the rotation tables, and whether positions continue from the state.
    pub rotation: Option<(usize, bool)>,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// Planned for these counters, one per sequence, and no others.
    Once(Vec<Counters>),
    /// Runs from any counters.
    Replay,
    /// The same, with sequences from device memory: at most so many tokens each.
    Table(usize),
}

/// The host's copy of a state's counters: what plans are made from. [`Self::advance`] keeps it in
/// step with the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    layout: StateLayout,
    counters: Vec<Counters>,
}

impl Mirror {
    /// The mirror of a pool of empty states.
    pub fn new(layout: &StateLayout) -> Self {
        Self { layout: *layout, counters: vec![Counters::default(); layout.slots] }
    }

    /// The mirror of a state with these counters, one per slot.
    #[cfg_attr(not(test), allow(dead_code, reason = "states that come from the host"))]
    pub(crate) fn with_counters(layout: &StateLayout, counters: Vec<Counters>) -> Result<Self> {
        if counters.len() != layout.slots {
            let (got, expected) = (counters.len(), format!("{} (slots)", layout.slots));
            return Err(Error::Length { argument: "state", got, expected });
        }
        Ok(Self { layout: *layout, counters })
    }

    /// The layout of the mirrored state.
    pub fn layout(&self) -> &StateLayout {
        &self.layout
    }

    /// The problem of the mirrored state.
    pub fn problem(&self) -> &Problem {
        &self.layout.problem
    }

    pub(crate) fn counters(&self) -> &[Counters] {
        &self.counters
    }

    /// Tokens the slot has seen; also the default position of its next token.
    ///
    /// # Panics
    /// This and the two accessors below panic for a slot that the state does not have.
    pub fn tokens(&self, slot: usize) -> u64 {
        self.counters[slot].tokens
    }

    /// Tokens the slot has written into its memory.
    pub fn committed(&self, slot: usize) -> u64 {
        self.counters[slot].committed
    }

    /// Tokens in the slot's open segment, 0 to N − 1.
    pub fn open_len(&self, slot: usize) -> usize {
        self.counters[slot].open_len
    }

    /// Whether a run of the plan would be valid now.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn check(&self, plan: &Plan) -> Result<()> {
        self.after(plan, None).map(drop)
    }

    /// Accounts for one run of the plan. Runs are asynchronous: call it before the run, or the
    /// replay of its graph, and skip that if this fails.
    ///
    /// # Errors
    /// Nothing changes then. [`Error::Problem`] or [`Error::Length`] for a plan of another state;
    /// [`Error::Value`] when positions continued from the state leave the rotation tables, or when
    /// the plan runs once and the state has moved since it was made; [`Error::RotationChanged`].
    pub fn advance(&mut self, plan: &Plan) -> Result<()> {
        self.counters = self.after(plan, None)?;
        Ok(())
    }

    /// [`Self::advance`] for a plan whose sequences lie in device memory: what that table holds in
    /// this run, slot and number of new tokens of every sequence.
    ///
    /// # Errors
    /// As [`Self::advance`], and [`Error::Value`] or [`Error::Length`] for a table that the plan does
    /// not allow.
    pub fn advance_table(&mut self, plan: &Plan, sequences: &[(usize, usize)]) -> Result<()> {
        self.counters = self.after(plan, Some(sequences))?;
        Ok(())
    }

    /// The counters after a run.
    fn after(&self, plan: &Plan, table: Option<&[(usize, usize)]>) -> Result<Vec<Counters>> {
        let mut counters = self.counters.clone();
        let Some(state) = plan.state() else { return Ok(counters) };
        self.problem().check_same(state.problem())?;
        if state.slots != self.counters.len() {
            let (got, expected) = (self.counters.len(), format!("{} (slots)", state.slots));
            return Err(Error::Length { argument: "state", got, expected });
        }
        match &plan.effect {
            Effect::None => {}
            Effect::Set(slots) => {
                for (slot, (planned, after)) in slots.iter().enumerate() {
                    self.unmoved(slot, planned)?;
                    counters[slot] = *after;
                }
            }
            Effect::Reset(slots) => slots.iter().for_each(|&s| counters[s] = Counters::default()),
            Effect::Flush(slots) => {
                for (slot, planned) in slots {
                    self.unmoved(*slot, planned)?;
                    counters[*slot].flush();
                }
            }
            Effect::Tokens(tokens) => self.bring(tokens, table, &mut counters)?,
        }
        Ok(counters)
    }

    /// Moves `counters` past the new tokens of a run.
    fn bring(
        &self,
        tokens: &Tokens,
        table: Option<&[(usize, usize)]>,
        counters: &mut [Counters],
    ) -> Result<()> {
        match (&tokens.kind, table) {
            (Kind::Table(most), Some(table)) => check_table(table, tokens, *most, counters.len())?,
            (_, Some(_)) => {
                let expected = "a plan whose sequences lie in device memory";
                return Err(Error::value("plan", "a plan with its own sequences", expected));
            }
            (Kind::Once(planned), None) => {
                for (&(slot, _), planned) in tokens.sequences.iter().zip(planned) {
                    self.unmoved(slot, planned)?;
                }
            }
            _ => {}
        }
        let sequences: Vec<_> = (table.unwrap_or(&tokens.sequences).iter())
            .map(|&(slot, len)| {
                let position = counters[slot].tokens as usize;
                Sequence { slot, batch: 0, first: 0, len, position }
            })
            .collect();
        for s in sequences.iter().filter(|s| s.len > 0) {
            counters[s.slot].check_rotation(s.slot, tokens.rotation.is_some())?;
        }
        if let Some((rows, true)) = tokens.rotation {
            check_continued(rows, &sequences)?;
        }
        for s in sequences {
            for piece in pieces(self.problem(), s, counters[s.slot]) {
                counters[s.slot].advance(&piece, tokens.rotation.is_some());
            }
        }
        Ok(())
    }

    /// A plan that runs once must find the counters it was made for.
    fn unmoved(&self, slot: usize, planned: &Counters) -> Result<()> {
        let now = &self.counters[slot];
        if now == planned {
            return Ok(());
        }
        let show = |c: &Counters| {
            format!("{} tokens seen, {} committed, {} open", c.tokens, c.committed, c.open_len)
        };
        let expected = format!("{}, as when the plan was made", show(planned));
        Err(Error::value(format!("state (slot {slot})"), show(now), expected))
    }
}

fn check_table(table: &[(usize, usize)], tokens: &Tokens, most: usize, slots: usize) -> Result<()> {
    if table.len() != tokens.sequences.len() {
        let expected = format!("{} (the number of sequences)", tokens.sequences.len());
        return Err(Error::Length { argument: "sequences", got: table.len(), expected });
    }
    check_slots(&table.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), slots)?;
    match table.iter().position(|(_, len)| *len > most) {
        Some(b) => {
            let expected = format!("0 to {most} new tokens");
            Err(Error::value(format!("q (sequence {b})"), table[b].1, expected))
        }
        None => Ok(()),
    }
}
