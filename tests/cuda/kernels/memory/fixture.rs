//! Device data that the memory kernels work on.

use infini_attn::cuda::params::{
    InfiniChain, InfiniPiece, InfiniProblem, InfiniRun, InfiniState, InfiniTensor,
};
use infini_attn::cuda::{Arch, KERNELS, Kernel};
use infini_attn::{DType, Element};
use ptxsim::Report;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

use super::model::Policy;
use crate::common::simulator::Simulator;
use crate::common::{bits, narrow, widen};

/// KV heads of every test.
pub const HEADS: usize = 2;
/// Elements of NaN behind every row of a tensor.
const GAP: usize = 8;
/// What buffers hold that a launch may leave alone.
pub const CANARY: f32 = -77.25;

/// The kernel of an operation; 0 where it does not depend on a dimension.
pub fn kernel(operation: &str, dtype: DType, dk: usize, dv: usize) -> &'static Kernel {
    let fits = |k: &&Kernel| {
        k.arch == Arch::Sm80
            && k.operation == operation
            && k.dtype.is_none_or(|d| d == dtype)
            && (k.key_dim == 0 || k.key_dim == dk)
            && (k.value_dim == 0 || k.value_dim == dv)
    };
    KERNELS.iter().find(fits).expect("a kernel of the table")
}

/// Launches a kernel of the table on its parameters.
#[track_caller]
pub fn launch<P: bytemuck::Pod>(
    sim: &mut Simulator,
    kernel: &Kernel,
    grid: [usize; 3],
    params: &P,
) -> Report {
    let grid = grid.map(|n| n as u32);
    let bytes = bytemuck::bytes_of(params);
    sim.launch(kernel.symbol, grid, kernel.threads, kernel.shared_bytes, bytes)
}

/// A problem of [`HEADS`] KV heads.
pub fn problem(dk: usize, dv: usize, n: usize, delta: bool, policy: Policy) -> InfiniProblem {
    InfiniProblem {
        key_dim: dk as i32,
        value_dim: dv as i32,
        heads: HEADS as i32,
        kv_heads: HEADS as i32,
        group: 1,
        segment_len: n as i32,
        delta: delta.into(),
        bypass: 0,
        denominator: policy.kind as i32,
        epsilon: policy.epsilon,
        scale_log2: 1.0,
        negative: 0,
    }
}

/// Random numbers, from a seed.
pub struct Random(StdRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// Normal numbers around `mean`.
    pub fn normal(&mut self, count: usize, mean: f32, deviation: f32) -> Vec<f32> {
        let mut next = || -> f32 { StandardNormal.sample(&mut self.0) };
        (0..count).map(|_| mean + deviation * next()).collect()
    }
}

/// Keys or values [batch][token][head][channel] on the host, rounded to T.
pub struct Rows<T> {
    pub data: Vec<T>,
    pub tokens: usize,
    pub dim: usize,
}

impl<T: Element> Rows<T> {
    pub fn new(values: &[f32], tokens: usize, dim: usize) -> Self {
        Self { data: narrow(values), tokens, dim }
    }

    /// The rows `first` to `first + len` of one head, exactly.
    pub fn rows(&self, batch: usize, first: usize, len: usize, head: usize) -> Vec<f64> {
        let row = |t: usize| {
            let at = ((batch * self.tokens + t) * HEADS + head) * self.dim;
            widen(&self.data[at..at + self.dim])
        };
        (first..first + len).flat_map(row).collect()
    }

    /// Uploads as a tensor with NaN behind every row, and `padding` tokens of NaN behind every
    /// batch.
    pub fn upload(&self, sim: &mut Simulator, name: &str, padding: usize) -> InfiniTensor {
        let nan: T = narrow(&[f32::NAN])[0];
        let stride = self.dim + GAP;
        let mut data = Vec::new();
        for batch in self.data.chunks(self.tokens * HEADS * self.dim) {
            for row in batch.chunks(self.dim) {
                data.extend_from_slice(row);
                data.extend([nan; GAP]);
            }
            data.extend(std::iter::repeat_n(nan, padding * HEADS * stride));
        }
        InfiniTensor {
            data: sim.upload(name, &data),
            batch: ((self.tokens + padding) * HEADS * stride) as i64,
            token: (HEADS * stride) as i64,
            head: stride as i64,
        }
    }
}

/// An open segment [slot][head][N][channel]: `len(slot)` rows, then NaN.
pub fn open_rows<T: Element>(
    random: &mut Random,
    lens: &[usize],
    n: usize,
    dim: usize,
    (mean, deviation): (f32, f32),
) -> Vec<T> {
    let mut data = Vec::new();
    for &len in lens {
        for _ in 0..HEADS {
            data.extend(random.normal(len * dim, mean, deviation));
            data.extend(std::iter::repeat_n(f32::NAN, (n - len) * dim));
        }
    }
    narrow(&data)
}

/// Rows of an open segment, exactly.
pub fn rows_of<T: Element>(
    open: &[T],
    n: usize,
    dim: usize,
    slot: usize,
    head: usize,
    len: usize,
) -> Vec<f64> {
    let at = (slot * HEADS + head) * n * dim;
    widen(&open[at..at + len * dim])
}

/// A state without storage: all addresses absent.
pub fn no_state(slots: usize) -> InfiniState {
    InfiniState { slots: slots as i64, ..InfiniState::default() }
}

/// Uploads pieces and chains.
pub fn run(sim: &mut Simulator, pieces: &[InfiniPiece], chains: &[InfiniChain]) -> InfiniRun {
    InfiniRun {
        pieces: sim.upload("pieces", pieces),
        chains: sim.upload("chains", chains),
        piece_count: pieces.len() as i32,
        chain_count: chains.len() as i32,
    }
}

/// Checks that a snapshot is the operand form of `m` [Dk][columns], bit by bit.
#[track_caller]
pub fn check_snapshot<T: Element>(what: &str, m: &[f32], columns: usize, got: &[T], scale: &[f32]) {
    for (group, &scale) in scale.iter().enumerate() {
        let columns_of = |row: usize| row * columns + group * 32..row * columns + group * 32 + 32;
        let rows = m.len() / columns;
        let top = (0..rows).flat_map(|r| &m[columns_of(r)]).fold(0.0, |t: f32, x| t.max(x.abs()));
        assert_eq!(scale.to_bits() << 9, 0, "{what}: {scale} is no power of two");
        let scaled = top * scale;
        assert!(top == 0.0 && scale == 1.0 || (1.0..2.0).contains(&scaled), "{what}: {scaled}");
        for row in 0..rows {
            let want: Vec<f32> = m[columns_of(row)].iter().map(|x| x * scale).collect();
            assert!(
                bits(&narrow::<T>(&want)) == bits(&got[columns_of(row)]),
                "{what}: row {row}, columns from {}",
                group * 32
            );
        }
    }
}

/// Buffers of a few bytes that every thread of a block or warp reads.
const DESCRIPTORS: [&str; 5] = ["pieces", "chains", "counters", "sequences", "g_scale"];

/// Checks that a launch moves at most 1.05 times the distinct bytes, of the buffers in `shared` as
/// many times as they say; that it writes whole sectors; and that its accesses to shared
/// memory are free of bank conflicts.
#[track_caller]
pub fn check_cost(what: &str, report: &Report, shared: &[(&str, usize)]) {
    let (mut moved, mut planned, mut written, mut sectors) = (0, 0, 0, 0);
    for b in report.buffers.iter().filter(|b| !DESCRIPTORS.contains(&b.name.as_str())) {
        let times = shared.iter().find(|s| s.0 == b.name).map_or(1, |s| s.1 as u64);
        moved += b.traffic.read + b.traffic.written;
        planned += times * b.distinct_read + b.distinct_written;
        written += b.traffic.written;
        sectors += b.traffic.written_sectors;
    }
    let ratio = moved as f64 / planned as f64;
    assert!(ratio <= 1.05, "{what}: {ratio:.3} x the distinct bytes\n{report}");
    let ratio = (32 * sectors) as f64 / written as f64;
    let split = report.lines.iter().filter(|l| 32 * l.global.written_sectors > l.global.written);
    let split: Vec<_> = split.map(|l| (&l.mnemonic, &l.source, l.global)).collect();
    assert!(ratio <= 1.05, "{what}: {ratio:.3} x the bytes written, in sectors: {split:#?}");
    let conflicts: Vec<String> = report
        .lines
        .iter()
        .filter(|line| line.shared.excess > 0)
        .map(|l| {
            format!("{} {:?}: {} of {}", l.mnemonic, l.source, l.shared.excess, l.shared.phases)
        })
        .collect();
    assert!(conflicts.is_empty(), "{what}: bank conflicts\n{}", conflicts.join("\n"));
}
