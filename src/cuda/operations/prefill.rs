//! Any number of tokens: five phases over runs of segments.
//!
//! 1. `segment_state`: B and column sums of σ(K) of every completed segment, in splits.
//! 2. `normaliser_scan`: z before every piece, and the state's z after the run.
//! 3. `segment_transition`, under the delta rule: G of every completed segment that finds a memory.
//! 4. `memory_scan`: M before every piece, as snapshot, and the state's M after the run.
//! 5. `segment_attention`: all outputs.
//!
//! Before them `rotate_keys`, with rotation; after them `append`, for sequences that end in the run:
//! what is left goes into the open segment, and the counters move. A chain of pieces that is cut
//! continues in the next run from the M and z that the last one left.

use bytemuck::Zeroable;

use super::attention::AttentionOperands;
use super::phases;
use super::phases::{Phases, Run, Splits};
use crate::call::form::{Piece, Sequence, pieces};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::Operand;
use crate::cuda::plan::allocation::Allocation;
use crate::cuda::plan::call::{Call, Resolved};
use crate::cuda::plan::effect::Kind;
use crate::cuda::plan::kernel::{Arch, Kernel};
use crate::cuda::plan::kernels::find;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::*;
use crate::cuda::plan::problem::problem_params;
use crate::cuda::plan::sequences::{clear_padding, padding};
use crate::cuda::plan::target::{Chosen, Target};
use crate::error::Result;
use crate::memory::Counters;
use crate::problem::Problem;

/// How a prefill is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillOptions {
    /// Bytes of workspace for the segments of a run; at least one segment runs at a time. Tables
    /// (64 bytes per segment of the whole call) come on top. Default 256 MiB.
    pub workspace_bytes: u64,
    /// The device it is planned for.
    pub target: Target,
}

impl Default for PrefillOptions {
    fn default() -> Self {
        Self { workspace_bytes: 256 << 20, target: Target::default() }
    }
}

/// Plans [`prefill`](crate::prefill) on the device.
///
/// # Errors
/// Every error of [`prefill`](crate::prefill), except a NaN in the gate. [`crate::Error::Unsupported`]
/// when no kernels are compiled for the problem, [`crate::Error::Stride`] for rows that do not start
/// at multiples of 16 bytes, [`crate::Error::DType`] for a tensor of another type,
/// [`crate::Error::Value`] for a rotation that the state has no room for, a call too large for one
/// launch, or a target that [`Target::check`] refuses.
pub fn plan_prefill(
    problem: &Problem,
    call: &Call<'_>,
    state: &Mirror,
    options: &PrefillOptions,
) -> Result<Plan> {
    options.target.check()?;
    let call = call.resolve(problem, state, None)?;
    let prefill = Prefill::new(&call, state, options)?;
    let title = format!("prefill {}; {}", call.shapes(), prefill.extent());
    let mut plan = Plan::new(title, state.layout(), call.effect(once(&call, state)));
    let mut workspace = Allocation::new(Operand::Workspace);
    prefill.launches(&call, state, &mut plan, &mut workspace)?;
    let params = call.params(0);
    if let Some(sequences) = padding(&call, None, &mut plan, &mut workspace)? {
        clear_padding(&call, params, sequences, &mut plan)?;
    }
    Ok(plan.finish(call.requirements(), &workspace))
}

/// A plan for one run of a call, from where its slots stand.
pub(super) fn once(call: &Resolved<'_>, state: &Mirror) -> Kind {
    Kind::Once(call.sequences.iter().map(|s| state.counters()[s.slot]).collect())
}

/// The pieces of a call, cut into runs.
pub(super) struct Prefill {
    target: Target,
    splits: Splits,
    segments: usize,
    per_run: usize,
    runs: Vec<Run>,
}

impl Prefill {
    pub fn new(call: &Resolved<'_>, state: &Mirror, options: &PrefillOptions) -> Result<Self> {
        let (problem, counters) = (&call.problem, state.counters());
        let all: Vec<_> =
            call.sequences.iter().flat_map(|s| counted(call, s, counters[s.slot])).collect();
        let splits = Splits::of(problem, &options.target)?;
        let mut one = Allocation::new(Operand::Workspace);
        Arrays::new(call, splits, 1, &mut one)?;
        let per_run = Run::units(all.len(), 1, one.bytes(), options.workspace_bytes);
        let runs: Vec<Run> = all.chunks(per_run).map(|pieces| run(problem, pieces)).collect();
        Ok(Self { target: options.target, splits, segments: all.len(), per_run, runs })
    }

    /// For titles.
    pub fn extent(&self) -> String {
        format!("segments: {}, runs: {}", self.segments, self.runs.len())
    }

    pub fn launches(
        &self,
        call: &Resolved<'_>,
        state: &Mirror,
        plan: &mut Plan,
        workspace: &mut Allocation,
    ) -> Result<()> {
        let Self { target, splits, segments, per_run, ref runs } = *self;
        let params = call.copy_positions(plan, workspace)?;
        let tables = Run::copy_tables(runs, plan, workspace)?;
        let (state, pieces) = (state.layout().symbols(), per_run.min(segments));
        let (memory, arrays) = Arrays::new(call, splits, pieces, workspace)?;
        let phases = Phases {
            p: call.problem,
            target,
            lead: call.lead(),
            k: params.k,
            v: params.v,
            state,
            splits,
            arrays: memory,
        };
        let problem = problem_params(&call.problem);
        let planner = Planner { call, problem, params, phases, arrays };
        runs.iter().zip(tables).try_for_each(|(run, table)| planner.run(run, table, plan))
    }
}

/// Pieces that run together, each with the counters after it.
fn run(p: &Problem, pieces: &[(Piece, Counters)]) -> Run {
    let mut chains: Vec<InfiniChain> = Vec::new();
    for (i, (piece, after)) in pieces.iter().enumerate() {
        let slot = piece.seq.slot as i32;
        if chains.last().is_none_or(|chain| chain.slot != slot) {
            let (first_piece, empty) = (i as i32, piece.empty.into());
            chains.push(InfiniChain { slot, first_piece, empty, ..Zeroable::zeroed() });
        }
        if let Some(chain) = chains.last_mut() {
            chain.pieces += 1;
            (chain.tokens, chain.committed) = (after.tokens as i64, after.committed as i64);
            chain.ends = (piece.start + piece.len == piece.seq.len).into();
        }
    }
    Run::new(p, pieces.iter().map(|(piece, _)| piece_params(piece)).collect(), chains)
}

/// Of so many pieces those whose tiles run together: as many as leave their keys and values in L2.
fn piece_group(p: &Problem, l2_bytes: usize, pieces: usize) -> i32 {
    let row = (p.key_dim() + p.value_dim()) * p.dtype().bytes();
    let bytes = row.saturating_mul(p.kv_heads()).saturating_mul(p.segment_len());
    (l2_bytes / bytes.max(1)).clamp(1, pieces.clamp(1, i32::MAX as usize)) as i32
}

/// New tokens of the longest piece.
fn longest(run: &Run) -> usize {
    run.pieces.iter().map(|piece| piece.len as usize).max().unwrap_or(0)
}

/// A sequence's pieces, each with the counters after it.
fn counted(call: &Resolved<'_>, s: &Sequence, mut counters: Counters) -> Vec<(Piece, Counters)> {
    let rotated = call.rotation().is_some();
    let counted = pieces(&call.problem, *s, counters).map(|piece| {
        counters.advance(&piece, rotated);
        (piece, counters)
    });
    counted.collect()
}

fn piece_params(piece: &Piece) -> InfiniPiece {
    InfiniPiece {
        first: (piece.seq.first + piece.start) as i64,
        position: (piece.seq.position + piece.start) as i64,
        slot: piece.seq.slot as i32,
        batch: piece.seq.batch as i32,
        len: piece.len as i32,
        cached: piece.cached as i32,
        full: piece.full.into(),
        empty: piece.empty.into(),
    }
}

/// Arrays of a run in the workspace besides those of the memory phases, one record per piece.
#[derive(Clone, Copy)]
struct Arrays {
    rotated: u64,
    snapshot: u64,
    snapshot_scale: u64,
}

impl Arrays {
    fn new(
        call: &Resolved<'_>,
        splits: Splits,
        pieces: usize,
        workspace: &mut Allocation,
    ) -> Result<(phases::Arrays, Self)> {
        let p = &call.problem;
        let (h, dk, dv) = (p.kv_heads(), p.key_dim(), p.value_dim());
        let (n, t) = (p.segment_len(), p.dtype().bytes());
        let scales = dv / INFINI_SCALE_COLUMNS as usize;
        let rotated = if call.rotation().is_some() { pieces } else { 0 };
        let memory = phases::Arrays::new(p, splits.count, pieces, workspace)?;
        let own = Self {
            rotated: workspace.part(&[rotated, h, n, dk], t)?,
            snapshot: workspace.part(&[pieces, h, dk, dv], t)?,
            snapshot_scale: workspace.part(&[pieces, h, scales], 4)?,
        };
        Ok((memory, own))
    }
}

/// Launches the phases of every run.
struct Planner<'a> {
    call: &'a Resolved<'a>,
    problem: InfiniProblem,
    params: InfiniCall,
    phases: Phases,
    arrays: Arrays,
}

impl Planner<'_> {
    fn run(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        let (phases, z) = (&self.phases, self.phases.state.normalizer);
        self.rotate_keys(run, table, plan)?;
        phases.state(run, table, plan)?;
        phases.normaliser(run, table, [z, z], plan)?;
        phases.transition(run, table, plan)?;
        phases.scan(run, table, self.scan(), "M before every segment", plan)?;
        self.segment_attention(run, table, plan)?;
        self.append(run, table, plan)
    }

    fn kernel(&self, operation: &str) -> Result<&'static Kernel> {
        find(operation, &self.call.problem, Arch::Sm80)
    }

    fn rotate_keys(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        if self.call.rotation().is_none() {
            return Ok(());
        }
        let p = &self.call.problem;
        // What attention reads at a time by tensor copies, if it does.
        let block = find("segment_attention", p, self.phases.target.arch)?.keys.max(1);
        let rows = longest(run).next_multiple_of(block).min(p.segment_len());
        let grid = [rows.div_ceil(8), p.kv_heads(), run.pieces.len()];
        let params = InfiniRotateKeys {
            problem: self.problem,
            k: self.params.k,
            rope: self.params.rope,
            run: table,
            status: self.phases.state.status,
            rotated: self.arrays.rotated,
            block: block as i64,
        };
        plan.launch(self.kernel("rotate_keys")?, grid, params, "keys of the local branch")
    }

    /// From the state's memory back to it, with a snapshot before every piece.
    fn scan(&self) -> InfiniMemoryScan {
        let state = &self.phases.state;
        InfiniMemoryScan {
            start_kind: INFINI_START_MEMORY as i32,
            b: self.phases.arrays.b,
            start: state.memory,
            end: state.memory,
            snapshot: self.arrays.snapshot,
            snapshot_scale: self.arrays.snapshot_scale,
            end_snapshot: state.snapshot,
            end_snapshot_scale: state.snapshot_scale,
            columns: self.call.problem.value_dim() as i64,
            ..Zeroable::zeroed()
        }
    }

    fn segment_attention(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        let (p, target) = (&self.call.problem, self.phases.target);
        let pieces = run.pieces.len();
        // Neighbouring query heads of a group read the same keys, values and memory.
        let pairs = p.group().is_multiple_of(2) && target.pairs > 0;
        let shared_by = if pairs { target.shared_by } else { 1 };
        let operands = AttentionOperands {
            p,
            call: &self.params,
            state: &self.phases.state,
            lead: self.phases.lead,
            rotated: self.call.rotation().map(|_| (self.arrays.rotated, pieces)),
            snapshot: (self.arrays.snapshot, pieces),
            shared_by,
        };
        let sources = |kernel: &Kernel| operands.sources(kernel);
        let chosen = Chosen::new("segment_attention", p, target, sources)?;
        let chosen = chosen.persistent(target, shared_by);
        let kernel = chosen.kernel;
        let tiles = longest(run).div_ceil(kernel.rows);
        let params = InfiniSegmentAttention {
            problem: self.problem,
            call: self.params,
            state: self.phases.state,
            run: table,
            rotated: self.arrays.rotated,
            snapshot: self.arrays.snapshot,
            snapshot_scale: self.arrays.snapshot_scale,
            z: self.phases.arrays.z,
            tiles: tiles as i32,
            piece_group: piece_group(p, target.l2_bytes, run.pieces.len()),
            shared_by: shared_by as i32,
            reserved: 0,
        };
        let halves = 1 + usize::from(self.call.a_mem());
        let blocks = [run.pieces.len(), p.heads(), halves];
        let blocks = blocks.iter().fold(tiles, |all, extent| all.saturating_mul(*extent));
        let why = format!("query tiles per segment and head: {tiles}, of {} rows", kernel.rows);
        plan.launch(chosen, [blocks, 1, 1], params, why)
    }

    fn append(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        let ends = run.chains.iter().filter(|chain| chain.ends != 0).count();
        if ends == 0 {
            return Ok(());
        }
        let p = &self.call.problem;
        let params = InfiniAppend {
            problem: self.problem,
            call: self.params,
            state: self.phases.state,
            run: table,
            rotated: self.arrays.rotated,
        };
        let grid = [p.segment_len().div_ceil(8), p.kv_heads(), run.chains.len()];
        let why = format!("open segments and counters; sequences that end: {ends}");
        plan.launch(self.kernel("append")?, grid, params, why)
    }
}
