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

use super::address::Bytes;
use super::call::{Resolved, problem_params};
use super::params::*;
use super::plan::{Allocation, Plan};
use super::sequences::{clear_padding, padding};
use super::state::Kind;
use super::{Call, Kernel, Mirror, Operand, find};
use crate::call::{Piece, Sequence, pieces};
use crate::memory::Counters;
use crate::{Problem, Result, Update};

/// Tokens of a tile of keys and values: parts of a segment are multiples of it.
pub(super) const TILE: usize = 64;

/// How a prefill is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillOptions {
    /// Bytes of workspace for the segments of a run; at least one segment runs at a time. Tables
    /// (64 bytes per segment of the whole call) come on top. Default 256 MiB.
    pub workspace_bytes: u64,
    /// Multiprocessors of the device, by which segments are split. Default 132.
    pub multiprocessors: usize,
}

impl Default for PrefillOptions {
    fn default() -> Self {
        Self { workspace_bytes: 256 << 20, multiprocessors: 132 }
    }
}

/// Plans [`prefill`](crate::prefill) on the device.
///
/// # Errors
/// Every error of [`prefill`](crate::prefill), except a NaN in the gate. [`crate::Error::Unsupported`]
/// when no kernels are compiled for the problem, [`crate::Error::Stride`] for rows that do not start
/// at multiples of 16 bytes, [`crate::Error::DType`] for a tensor of another type,
/// [`crate::Error::Value`] for a rotation that the state has no room for, or a call too large for
/// one launch.
pub fn plan_prefill(
    problem: &Problem,
    call: &Call<'_>,
    state: &Mirror,
    options: &PrefillOptions,
) -> Result<Plan> {
    let call = call.resolve(problem, state, None)?;
    let counters = state.counters();
    let all: Vec<_> =
        call.sequences.iter().flat_map(|s| counted(&call, s, counters[s.slot])).collect();
    let columns = find("segment_state", problem)?.columns;
    let (splits, split_len) = splits(problem, columns, options.multiprocessors);
    let per_run = Arrays::pieces_per_run(&call, splits, all.len(), options.workspace_bytes)?;
    let runs: Vec<Run> = all.chunks(per_run).map(|pieces| Run::new(problem, pieces)).collect();

    let (segments, count) = (all.len(), runs.len());
    let title = format!("prefill {}; segments: {segments}, runs: {count}", call.shapes());
    let before = call.sequences.iter().map(|s| counters[s.slot]).collect();
    let mut plan = Plan::new(title, state.layout(), call.effect(Kind::Once(before)));
    let mut workspace = Allocation::new(Operand::Workspace);
    let params = call.copy_positions(&mut plan, &mut workspace)?;
    let tables = copy_tables(&runs, &mut plan, &mut workspace)?;
    let planner = Planner {
        call: &call,
        problem: problem_params(problem),
        params,
        state: state.layout().symbols(),
        arrays: Arrays::new(&call, splits, per_run.min(all.len()), &mut workspace)?,
        splits,
        split_len,
    };
    let padding = padding(&call, None, &mut plan, &mut workspace)?;
    for (run, table) in runs.iter().zip(tables) {
        planner.run(run, table, &mut plan)?;
    }
    if let Some(sequences) = padding {
        clear_padding(&call, params, sequences, &mut plan)?;
    }
    Ok(plan.finish(call.requirements(), &workspace))
}

/// Pieces that run together.
struct Run {
    pieces: Vec<InfiniPiece>,
    chains: Vec<InfiniChain>,
    /// New tokens of the longest piece.
    longest: usize,
    /// Pieces that complete a segment, and those of them that find a memory.
    full: usize,
    transits: usize,
    /// Chains that end.
    ends: usize,
}

impl Run {
    fn new(p: &Problem, run: &[(Piece, Counters)]) -> Self {
        let mut chains: Vec<InfiniChain> = Vec::new();
        for (i, (piece, after)) in run.iter().enumerate() {
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
        let pieces = || run.iter().map(|(piece, _)| piece);
        let transits = |piece: &&Piece| piece.full && !piece.empty && p.update() == Update::Delta;
        Self {
            pieces: pieces().map(piece_params).collect(),
            ends: chains.iter().filter(|chain| chain.ends != 0).count(),
            chains,
            longest: pieces().map(|piece| piece.len).max().unwrap_or(0),
            full: pieces().filter(|piece| piece.full).count(),
            transits: pieces().filter(transits).count(),
        }
    }
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

/// Copies the tables of all runs at once; each run's place in them.
fn copy_tables(
    runs: &[Run],
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<Vec<InfiniRun>> {
    let pieces: Vec<_> = runs.iter().flat_map(|run| run.pieces.clone()).collect();
    let chains: Vec<_> = runs.iter().flat_map(|run| run.chains.clone()).collect();
    let mut at = InfiniRun::zeroed();
    at.pieces = workspace.part(&[pieces.len()], size_of::<InfiniPiece>())?;
    at.chains = workspace.part(&[chains.len()], size_of::<InfiniChain>())?;
    plan.copy(at.pieces, Bytes::plain(&pieces));
    plan.copy(at.chains, Bytes::plain(&chains));
    Ok(runs
        .iter()
        .map(|run| {
            (at.piece_count, at.chain_count) = (run.pieces.len() as i32, run.chains.len() as i32);
            let table = at;
            at.pieces += size_of_val(&run.pieces[..]) as u64;
            at.chains += size_of_val(&run.chains[..]) as u64;
            table
        })
        .collect())
}

/// Parts of a segment that `segment_state` sums apart, and tokens of each: by N, Dk, Dv and the
/// device alone, so that a sequence's bits do not depend on the batch around it.
///
/// As many as give two blocks per multiprocessor to 16 segments of 8 KV heads; but no part so short
/// that writing its B (f32) costs as much as half of reading its keys and values.
pub(super) fn splits(p: &Problem, columns: usize, multiprocessors: usize) -> (usize, usize) {
    const HEADS: usize = 16 * 8;
    let (n, dk, dv) = (p.segment_len(), p.key_dim(), p.value_dim());
    let blocks = HEADS * (dv / columns);
    let wanted = (2 * multiprocessors + blocks / 2) / blocks;
    let shortest = 4 * dk * dv / (dk + dv);
    let parts = wanted.min(n / shortest).max(1);
    let len = n.div_ceil(parts).next_multiple_of(TILE);
    (n.div_ceil(len), len)
}

/// Arrays of a run in the workspace, one record per piece.
#[derive(Clone, Copy)]
struct Arrays {
    rotated: u64,
    b: u64,
    sums: u64,
    z: u64,
    g: u64,
    g_scale: u64,
    snapshot: u64,
    snapshot_scale: u64,
}

impl Arrays {
    fn new(
        call: &Resolved<'_>,
        splits: usize,
        pieces: usize,
        workspace: &mut Allocation,
    ) -> Result<Self> {
        let p = &call.problem;
        let (h, dk, dv) = (p.kv_heads(), p.key_dim(), p.value_dim());
        let (n, t) = (p.segment_len(), p.dtype().bytes());
        let scales = dv / INFINI_SCALE_COLUMNS as usize;
        let rotated = if call.rotation().is_some() { pieces } else { 0 };
        let delta = if p.update() == Update::Delta { pieces } else { 0 };
        Ok(Self {
            rotated: workspace.part(&[rotated, h, n, dk], t)?,
            b: workspace.part(&[pieces, h, splits, dk, dv], 4)?,
            sums: workspace.part(&[pieces, h, splits, dk], 4)?,
            z: workspace.part(&[pieces, h, dk], 4)?,
            g: workspace.part(&[delta, h, dk, dk], t)?,
            g_scale: workspace.part(&[delta, h, dk / 16], 4)?,
            snapshot: workspace.part(&[pieces, h, dk, dv], t)?,
            snapshot_scale: workspace.part(&[pieces, h, scales], 4)?,
        })
    }

    /// Pieces per run: none over the budget, all runs of about the same length.
    fn pieces_per_run(
        call: &Resolved<'_>,
        splits: usize,
        pieces: usize,
        budget: u64,
    ) -> Result<usize> {
        /// A grid's z.
        const MOST: usize = 65_535;
        let mut one = Allocation::new(Operand::Workspace);
        Self::new(call, splits, 1, &mut one)?;
        let fit = usize::try_from(budget / one.bytes()).unwrap_or(MOST).clamp(1, MOST);
        Ok(pieces.div_ceil(pieces.div_ceil(fit).max(1)).max(1))
    }
}

/// Launches the phases of every run.
struct Planner<'a> {
    call: &'a Resolved<'a>,
    problem: InfiniProblem,
    params: InfiniCall,
    state: InfiniState,
    arrays: Arrays,
    splits: usize,
    split_len: usize,
}

impl Planner<'_> {
    fn run(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        self.rotate_keys(run, table, plan)?;
        self.segment_state(run, table, plan)?;
        self.normaliser_scan(run, table, plan)?;
        self.segment_transition(run, table, plan)?;
        self.memory_scan(run, table, plan)?;
        self.segment_attention(run, table, plan)?;
        self.append(run, table, plan)
    }

    fn kernel(&self, operation: &str) -> Result<&'static Kernel> {
        find(operation, &self.call.problem)
    }

    fn rotate_keys(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        if self.call.rotation().is_none() {
            return Ok(());
        }
        let grid = [run.longest.div_ceil(8), self.call.problem.kv_heads(), run.pieces.len()];
        let params = InfiniRotateKeys {
            problem: self.problem,
            k: self.params.k,
            rope: self.params.rope,
            run: table,
            status: self.state.status,
            rotated: self.arrays.rotated,
        };
        plan.launch(self.kernel("rotate_keys")?, grid, params, "keys of the local branch")
    }

    fn segment_state(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        if run.full == 0 {
            return Ok(());
        }
        let kernel = self.kernel("segment_state")?;
        let p = &self.call.problem;
        let slices = p.value_dim() / kernel.columns;
        let params = InfiniSegmentState {
            problem: self.problem,
            k: self.params.k,
            v: self.params.v,
            state: self.state,
            run: table,
            splits: self.splits as i32,
            split_len: self.split_len as i32,
            b: self.arrays.b,
            sums: self.arrays.sums,
        };
        let why = format!(
            "segments completed: {} of {}; parts: {}, of {} tokens",
            run.full,
            run.pieces.len(),
            self.splits,
            self.split_len
        );
        plan.launch(kernel, [self.splits, p.kv_heads() * slices, run.pieces.len()], params, why)
    }

    fn normaliser_scan(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        let params = InfiniNormaliserScan {
            problem: self.problem,
            run: table,
            splits: self.splits as i32,
            reserved: 0,
            sums: self.arrays.sums,
            z: self.arrays.z,
            start: self.state.normalizer,
            end: self.state.normalizer,
        };
        let grid = [self.call.problem.kv_heads(), run.chains.len(), 1];
        plan.launch(self.kernel("normaliser_scan")?, grid, params, "z before every segment")
    }

    fn segment_transition(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        if run.transits == 0 {
            return Ok(());
        }
        let kernel = self.kernel("segment_transition")?;
        let p = &self.call.problem;
        let params = InfiniSegmentTransition {
            problem: self.problem,
            k: self.params.k,
            state: self.state,
            run: table,
            z: self.arrays.z,
            g: self.arrays.g,
            g_scale: self.arrays.g_scale,
        };
        let why = format!("delta rule; segments that find a memory: {}", run.transits);
        let grid = [p.key_dim() / kernel.columns, p.kv_heads(), run.pieces.len()];
        plan.launch(kernel, grid, params, why)
    }

    fn memory_scan(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        let kernel = self.kernel("memory_scan")?;
        let p = &self.call.problem;
        let [g, g_scale] =
            if run.transits > 0 { [self.arrays.g, self.arrays.g_scale] } else { [0, 0] };
        let params = InfiniMemoryScan {
            problem: self.problem,
            run: table,
            splits: self.splits as i32,
            start_kind: INFINI_START_MEMORY as i32,
            b: if run.full > 0 { self.arrays.b } else { 0 },
            g,
            g_scale,
            start: self.state.memory,
            end: self.state.memory,
            snapshot: self.arrays.snapshot,
            snapshot_scale: self.arrays.snapshot_scale,
            end_snapshot: self.state.snapshot,
            end_snapshot_scale: self.state.snapshot_scale,
            columns: p.value_dim() as i64,
        };
        let grid = [p.value_dim() / kernel.columns, p.kv_heads(), run.chains.len()];
        plan.launch(kernel, grid, params, "M before every segment")
    }

    fn segment_attention(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        let kernel = self.kernel("segment_attention")?;
        let tiles = run.longest.div_ceil(kernel.rows);
        let params = InfiniSegmentAttention {
            problem: self.problem,
            call: self.params,
            state: self.state,
            run: table,
            rotated: self.arrays.rotated,
            snapshot: self.arrays.snapshot,
            snapshot_scale: self.arrays.snapshot_scale,
            z: self.arrays.z,
            tiles: tiles as i32,
            reserved: 0,
        };
        let halves = 1 + usize::from(self.call.a_mem());
        let blocks = [run.pieces.len(), self.call.problem.heads(), halves];
        let blocks = blocks.iter().fold(tiles, |all, extent| all.saturating_mul(*extent));
        let why = format!("query tiles per segment and head: {tiles}, of {} rows", kernel.rows);
        plan.launch(kernel, [blocks, 1, 1], params, why)
    }

    fn append(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        if run.ends == 0 {
            return Ok(());
        }
        let p = &self.call.problem;
        let params = InfiniAppend {
            problem: self.problem,
            call: self.params,
            state: self.state,
            run: table,
            rotated: self.arrays.rotated,
        };
        let grid = [p.segment_len().div_ceil(8), p.kv_heads(), run.chains.len()];
        let why = format!("open segments and counters; sequences that end: {}", run.ends);
        plan.launch(self.kernel("append")?, grid, params, why)
    }
}
