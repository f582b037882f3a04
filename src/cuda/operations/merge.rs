//! Merging on the device: local attentions over disjoint keys, and linear memories over disjoint
//! tokens.
//!
//! Partial results: 1. `merge_partials`. Memories: 1. `sum` of M and of z; 2. the counters, copied;
//! 3. `snapshot`.

use crate::call::check::dtype_is;
use crate::call::merge::{check_partials, merge_counters};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Bytes, Operand, Requirement};
use crate::cuda::plan::allocation::{Allocation, PART_ALIGN};
use crate::cuda::plan::effect::{Change, Effect};
use crate::cuda::plan::kernels::find_for;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::*;
use crate::cuda::plan::tensor::{DeviceTensor, ROW_ALIGN};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Plans [`merge_partials`](crate::merge_partials) on the device: `a_dot[i]` at
/// [`Operand::Part`]`(i)`, `lse[i]` at [`Operand::PartLse`]`(i)`, `out` at [`Operand::O`] and
/// `out_lse` at [`Operand::Lse`]. `out` may be one of the parts.
///
/// # Errors
/// Those of [`merge_partials`](crate::merge_partials); [`Error::DType`] for a tensor of another type
/// than `out`, or a log-sum-exp that is not f32; [`Error::Unsupported`] for a type without kernels;
/// [`Error::Stride`] for rows that do not start at multiples of 16 bytes, [`Error::Shape`] for rows
/// that are not whole multiples of them; [`Error::Length`] for more than 16384 parts.
pub fn plan_merge_partials(
    a_dot: &[DeviceTensor],
    lse: &[DeviceTensor],
    out: &DeviceTensor,
    out_lse: Option<&DeviceTensor>,
) -> Result<Plan> {
    check_parts(a_dot, lse, out, out_lse)?;
    let kernel = find_for("merge_partials", out.dtype())?;
    let (batches, [tokens, heads, width]) = match *out.shape() {
        [b, t, h, d] => (b, [t, h, d]),
        [t, h, d] => (1, [t, h, d]),
        _ => (0, [0; 3]), // refused above
    };
    let title = format!("merge {} partial results, {} {:?}", a_dot.len(), out.dtype(), out.shape());
    let mut plan = Plan::stateless(title);
    let mut workspace = Allocation::new(Operand::Workspace);
    let mut table = |tensors: Vec<InfiniTensor>| -> Result<u64> {
        let at = workspace.part(&[tensors.len()], size_of::<InfiniTensor>())?;
        plan.copy(at, Bytes::new(&tensors));
        Ok(at)
    };
    let index = |i: usize| i as u16; // checked above
    let parts = a_dot.iter().enumerate().map(|(i, x)| x.rows(Operand::Part(index(i))));
    let logs = lse.iter().enumerate().map(|(i, x)| x.head_rows(Operand::PartLse(index(i))));
    let params = InfiniMergePartials {
        a_dot: table(parts.collect())?,
        lse: table(logs.collect())?,
        out: out.rows(Operand::O),
        out_lse: out_lse.map_or_else(InfiniTensor::default, |x| x.head_rows(Operand::Lse)),
        batches: batches as i64,
        tokens: tokens as i64,
        heads: heads as i32,
        value_dim: width as i32,
        parts: a_dot.len() as i32,
        reserved: 0,
    };
    if width > 0 {
        let grid = [(batches * tokens).div_ceil(INFINI_MERGE_ROWS as usize), heads, 1];
        plan.launch(kernel, grid, params, "a warp per row")?;
    }

    let mut requirements = Vec::new();
    for (i, (a_dot, lse)) in a_dot.iter().zip(lse).enumerate() {
        requirements.push(a_dot.requirement(Operand::Part(index(i)), ROW_ALIGN));
        requirements.push(lse.requirement(Operand::PartLse(index(i)), size_of::<f32>()));
    }
    requirements.push(out.requirement(Operand::O, ROW_ALIGN));
    requirements.push(out_lse.and_then(|x| x.requirement(Operand::Lse, size_of::<f32>())));
    Ok(plan.finish(requirements.into_iter().flatten().collect(), &workspace))
}

fn check_parts(
    a_dot: &[DeviceTensor],
    lse: &[DeviceTensor],
    out: &DeviceTensor,
    out_lse: Option<&DeviceTensor>,
) -> Result<()> {
    let layouts = |list: &[DeviceTensor]| list.iter().map(|x| x.layout()).collect::<Vec<_>>();
    let out_lse_layout = out_lse.map(|x| x.layout());
    check_partials(&layouts(a_dot), &layouts(lse), &out.layout(), out_lse_layout.as_ref())?;
    out.layout().check_injective("out")?;
    if let Some(out_lse) = out_lse {
        dtype_is("out_lse", out_lse.dtype(), DType::F32)?;
        out_lse.layout().check_injective("out_lse")?;
    }
    if a_dot.len() > Operand::MAX_PARTS {
        let expected = format!("at most {}", Operand::MAX_PARTS);
        return Err(Error::Length { argument: "a_dot", got: a_dot.len(), expected });
    }
    for (a_dot, lse) in a_dot.iter().zip(lse) {
        dtype_is("a_dot", a_dot.dtype(), out.dtype())?;
        dtype_is("lse", lse.dtype(), DType::F32)?;
        a_dot.check_row_align("a_dot")?;
    }
    out.check_row_align("out")?;
    let elements = ROW_ALIGN / out.dtype().bytes();
    if !out.shape().last().is_some_and(|width| width.is_multiple_of(elements)) {
        let expected = format!("a last dimension of a multiple of {elements}");
        return Err(Error::shape("out", out.shape(), expected));
    }
    Ok(())
}

/// Plans [`merge_memories`](crate::merge_memories) on the device, in place: `state`, at
/// [`Operand::State`], is the last of the states and becomes the merged one; `earlier[i]`, at
/// [`Operand::Source`]`(i)`, is only read. Their mirrors must stay as they are until the plan has
/// run. In errors `earlier` and `state` together are `states`.
///
/// # Errors
/// Those of [`merge_memories`](crate::merge_memories), and [`Error::Length`] for more than 16384
/// states.
pub fn plan_merge_memories(earlier: &[&Mirror], state: &Mirror) -> Result<Plan> {
    let states = || earlier.iter().copied().chain([state]);
    states().try_for_each(|s| s.check_finished(0..s.layout().slots()))?;
    let counted: Vec<_> = states().map(|s| (s.problem(), s.counters())).collect();
    let merged = merge_counters(&counted)?;
    if earlier.len() > Operand::MAX_PARTS {
        let expected = format!("at most {}", Operand::MAX_PARTS);
        return Err(Error::Length { argument: "states", got: earlier.len(), expected });
    }
    let (p, layout) = (state.problem(), state.layout());
    let title =
        format!("merge {} states of {} slots; {}", counted.len(), layout.slots(), p.shapes());
    let changes = Change::all(state.counters(), &merged);
    let mut plan = Plan::new(title, layout, Effect::Set(changes));
    let mut workspace = Allocation::new(Operand::Workspace);
    let matrix = layout.slots() * p.kv_heads() * p.key_dim();
    for (name, part, count) in
        [("M", Part::Memory, matrix * p.value_dim()), ("z", Part::Normalizer, matrix)]
    {
        let mut inputs: Vec<u64> = (earlier.iter().enumerate())
            .map(|(i, s)| Operand::Source(i as u16).at(part.of(&s.layout().params(0))))
            .collect();
        let out = part.of(&layout.symbols());
        inputs.push(out);
        add_up(&inputs, out, count, name, &mut plan, &mut workspace)?;
    }
    layout.set_counters(&mut plan, 0, &merged);
    layout.snapshots(&mut plan, 0, layout.slots())?;
    let requirements = (earlier.iter().enumerate())
        .map(|(i, s)| Requirement {
            operand: Operand::Source(i as u16),
            align: PART_ALIGN,
            before: 0,
            after: s.layout().bytes(),
        })
        .collect();
    Ok(plan.finish(requirements, &workspace))
}

/// The f32 parts of a state that add up.
#[derive(Clone, Copy)]
enum Part {
    Memory,
    Normalizer,
}

impl Part {
    fn of(self, state: &InfiniState) -> u64 {
        match self {
            Part::Memory => state.memory,
            Part::Normalizer => state.normalizer,
        }
    }
}

/// Launches `sum`: `count` f32 at `out` become the sum of those at `inputs`, of which `out` may be
/// one.
pub fn add_up(
    inputs: &[u64],
    out: u64,
    count: usize,
    why: &str,
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<()> {
    /// Elements of a block, and blocks that fill any device; the grid strides over the rest.
    const BLOCK: usize = 1024;
    const MOST: usize = 4096;
    if count == 0 {
        return Ok(());
    }
    let table = workspace.part(&[inputs.len()], size_of::<u64>())?;
    plan.copy(table, Bytes::new(inputs));
    let params = InfiniSum {
        inputs: table,
        out,
        count: count as i64,
        parts: inputs.len() as i32,
        reserved: 0,
    };
    let why = format!("{why}: {} × {count} f32", inputs.len());
    plan.launch(find_for("sum", DType::F32)?, [count.div_ceil(BLOCK).min(MOST), 1, 1], params, why)
}
