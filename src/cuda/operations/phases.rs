//! The phases that turn runs of segments into memories: launched by prefill on the tokens of states,
//! by key sums and maps on runs that need no state.

use bytemuck::Zeroable;

use crate::cuda::plan::Plan;
use crate::cuda::plan::address::Bytes;
use crate::cuda::plan::allocation::Allocation;
use crate::cuda::plan::kernel::Arch;
use crate::cuda::plan::kernels::find;
use crate::cuda::plan::params::*;
use crate::cuda::plan::problem::problem_params;
use crate::cuda::plan::target::{Chosen, Target};
use crate::cuda::plan::tensor_map::Source;
use crate::error::Result;
use crate::problem::{Problem, Update};

/// Tokens of a tile of keys and values: parts of a segment are multiples of it.
pub const TILE: usize = 64;

/// Most pieces of a run: a grid's z.
const MAX_PIECES: usize = 65_535;

/// Pieces that run together (a piece is one segment's share of the call), and the chains they form.
pub struct Run {
    pub pieces: Vec<InfiniPiece>,
    pub chains: Vec<InfiniChain>,
    /// Pieces that complete a segment, and those of them whose G is needed.
    full: usize,
    transits: usize,
}

impl Run {
    pub fn new(p: &Problem, pieces: Vec<InfiniPiece>, chains: Vec<InfiniChain>) -> Self {
        let full = || pieces.iter().filter(|piece| piece.full != 0);
        let transits = match p.update() {
            Update::Delta => full().filter(|piece| piece.empty == 0).count(),
            Update::Linear => 0,
        };
        Self { full: full().count(), transits, pieces, chains }
    }

    /// Copies the tables of all runs at once; each run's place in them.
    pub fn copy_tables(
        runs: &[Self],
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
        let place = |run: &Self| {
            (at.piece_count, at.chain_count) = (run.pieces.len() as i32, run.chains.len() as i32);
            let place = at;
            at.pieces += size_of_val(&run.pieces[..]) as u64;
            at.chains += size_of_val(&run.chains[..]) as u64;
            place
        };
        Ok(runs.iter().map(place).collect())
    }

    /// Of `all` units of `width` pieces, how many run together: no more than the budget holds, in
    /// runs of about the same length.
    pub fn units(all: usize, width: usize, bytes_of_piece: u64, workspace_bytes: u64) -> usize {
        let fit = usize::try_from(workspace_bytes / bytes_of_piece).unwrap_or(usize::MAX);
        let fit = (fit.min(MAX_PIECES) / width.max(1)).max(1);
        all.div_ceil(all.div_ceil(fit).max(1)).max(1)
    }
}

/// How a segment is cut into parts that are summed apart.
#[derive(Clone, Copy)]
pub struct Splits {
    pub count: usize,
    /// Tokens of a part.
    pub len: usize,
}

impl Splits {
    /// By N, Dk, Dv and the device alone, so that a sequence's bits do not depend on the batch around
    /// it.
    ///
    /// As many as give two blocks per multiprocessor to 16 segments of 8 KV heads; but no part so
    /// short that writing its B (f32) costs as much as half of reading its keys and values.
    pub fn of(p: &Problem, target: &Target) -> Result<Self> {
        const HEADS: usize = 16 * 8;
        let (n, dk, dv) = (p.segment_len(), p.key_dim(), p.value_dim());
        let Target { arch, multiprocessors, .. } = *target;
        let blocks = HEADS * (dv / find("segment_state", p, arch)?.columns);
        let wanted = (2 * multiprocessors + blocks / 2) / blocks;
        let shortest = 4 * dk * dv / (dk + dv);
        let parts = wanted.min(n / shortest).max(1);
        let len = n.div_ceil(parts).next_multiple_of(TILE);
        Ok(Self { count: n.div_ceil(len), len })
    }
}

/// Arrays of a run in the workspace, one record per piece; 0 where there is none.
#[derive(Clone, Copy)]
pub struct Arrays {
    /// B and column sums of σ(K), per part.
    pub b: u64,
    sums: u64,
    /// Key sums before the piece.
    pub z: u64,
    g: u64,
    g_scale: u64,
}

impl Arrays {
    /// For [`Phases::state`] without values and [`Phases::normaliser`].
    pub fn for_sums(
        p: &Problem,
        splits: usize,
        pieces: usize,
        workspace: &mut Allocation,
    ) -> Result<Self> {
        let (h, dk) = (p.kv_heads(), p.key_dim());
        Ok(Self {
            b: 0,
            sums: workspace.part(&[pieces, h, splits, dk], 4)?,
            z: workspace.part(&[pieces, h, dk], 4)?,
            g: 0,
            g_scale: 0,
        })
    }

    /// For all phases.
    pub fn new(
        p: &Problem,
        splits: usize,
        pieces: usize,
        workspace: &mut Allocation,
    ) -> Result<Self> {
        let (h, dk, dv) = (p.kv_heads(), p.key_dim(), p.value_dim());
        let delta = if p.update() == Update::Delta { pieces } else { 0 };
        Ok(Self {
            b: workspace.part(&[pieces, h, splits, dk, dv], 4)?,
            g: workspace.part(&[delta, h, dk, dk], p.dtype().bytes())?,
            g_scale: workspace.part(&[delta, h, dk / 16], 4)?,
            ..Self::for_sums(p, splits, pieces, workspace)?
        })
    }
}

/// Launches the phases of runs over the same tokens.
pub struct Phases {
    pub p: Problem,
    pub target: Target,
    /// B and T of k and v; packed: 1 and all tokens.
    pub lead: [usize; 2],
    pub k: InfiniTensor,
    /// Absent: sums only.
    pub v: InfiniTensor,
    /// Where open segments lie; zeroed when no piece starts in one.
    pub state: InfiniState,
    pub splits: Splits,
    pub arrays: Arrays,
}

impl Phases {
    /// B and column sums of σ(K) of every completed segment.
    pub fn state(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        if run.full == 0 {
            return Ok(());
        }
        let (chosen, all) = (self.state_kernel()?, run.pieces.len());
        let Splits { count, len } = self.splits;
        let params = InfiniSegmentState {
            problem: problem_params(&self.p),
            k: self.k,
            v: self.v,
            state: self.state,
            run: table,
            splits: count as i32,
            split_len: len as i32,
            b: self.arrays.b,
            sums: self.arrays.sums,
        };
        let slices = if self.v.data == 0 { 1 } else { self.p.value_dim() / chosen.kernel.columns };
        let why =
            format!("segments completed: {} of {all}; parts: {count}, of {len} tokens", run.full);
        plan.launch(chosen, [count, self.p.kv_heads() * slices, all], params, why)
    }

    /// Sums alone have a portable kernel only.
    fn state_kernel(&self) -> Result<Chosen> {
        if self.v.data == 0 {
            return Ok(find("segment_state", &self.p, Arch::Sm80)?.into());
        }
        let (dk, dv) = (self.p.key_dim(), self.p.value_dim());
        let (k, v) = (self.rows("k", self.k, dk), self.rows("v", self.v, dv));
        let open_k = self.open(self.state.open_k, dk).unwrap_or(k);
        let open_v = self.open(self.state.open_v, dv).unwrap_or(v);
        Chosen::new("segment_state", &self.p, self.target, |kernel| {
            [k, v, open_k, open_v].map(|source| (source, kernel.keys)).to_vec()
        })
    }

    /// k or v, of `channels` channels, for a tensor map.
    pub fn rows(&self, name: &'static str, tensor: InfiniTensor, channels: usize) -> Source {
        let [batches, tokens] = self.lead;
        Source::of_call(name, tensor, [batches, tokens, self.p.kv_heads(), channels])
    }

    /// A part of the state's open segments for a tensor map; none where there is no state.
    pub fn open(&self, part: u64, channels: usize) -> Option<Source> {
        (part != 0).then(|| Source::open(&self.p, &self.state, part, channels))
    }

    /// z before every piece from `start`, [slots, Hkv, Dk], and after the run in `end`.
    pub fn normaliser(
        &self,
        run: &Run,
        table: InfiniRun,
        [start, end]: [u64; 2],
        plan: &mut Plan,
    ) -> Result<()> {
        let params = InfiniNormaliserScan {
            problem: problem_params(&self.p),
            run: table,
            splits: self.splits.count as i32,
            reserved: 0,
            sums: self.arrays.sums,
            z: self.arrays.z,
            start,
            end,
        };
        let grid = [self.p.kv_heads(), run.chains.len(), 1];
        let chosen = Chosen::new("normaliser_scan", &self.p, self.target, |_| Vec::new())?;
        plan.launch(chosen.following(self.target), grid, params, "z before every segment")
    }

    /// G of every completed segment that finds a memory.
    pub fn transition(&self, run: &Run, table: InfiniRun, plan: &mut Plan) -> Result<()> {
        if run.transits == 0 {
            return Ok(());
        }
        let dk = self.p.key_dim();
        let k = self.rows("k", self.k, dk);
        let open_k = self.open(self.state.open_k, dk).unwrap_or(k);
        let chosen = Chosen::new("segment_transition", &self.p, self.target, |kernel| {
            [k, open_k].map(|source| (source, kernel.keys)).to_vec()
        })?;
        let params = InfiniSegmentTransition {
            problem: problem_params(&self.p),
            k: self.k,
            state: self.state,
            run: table,
            z: self.arrays.z,
            g: self.arrays.g,
            g_scale: self.arrays.g_scale,
        };
        let grid = [dk / chosen.kernel.columns, self.p.kv_heads(), run.pieces.len()];
        let why = format!("delta rule; segments that find a memory: {}", run.transits);
        plan.launch(chosen.following(self.target), grid, params, why)
    }

    /// M before every piece and after the run. `scan` says where from, where to, and how many columns;
    /// its B is left out where it is 0.
    pub fn scan(
        &self,
        run: &Run,
        table: InfiniRun,
        scan: InfiniMemoryScan,
        why: &str,
        plan: &mut Plan,
    ) -> Result<()> {
        let chosen = Chosen::new("memory_scan", &self.p, self.target, |_| Vec::new())?;
        let transits = |address| if run.transits > 0 { address } else { 0 };
        let params = InfiniMemoryScan {
            problem: problem_params(&self.p),
            run: table,
            splits: self.splits.count as i32,
            b: if run.full > 0 { scan.b } else { 0 },
            g: transits(self.arrays.g),
            g_scale: transits(self.arrays.g_scale),
            ..scan
        };
        let slices = scan.columns as usize / chosen.kernel.columns;
        plan.launch(
            chosen.following(self.target),
            [slices, self.p.kv_heads(), run.chains.len()],
            params,
            why,
        )
    }
}
