//! A run of prefill in the simulator: its data, and a launch per phase.

use infini_attn::Element;
use infini_attn::cuda::params::{
    InfiniChain, InfiniMemoryScan, InfiniNormaliserScan, InfiniPiece, InfiniProblem, InfiniRun,
    InfiniSegmentState, InfiniSegmentTransition, InfiniState, InfiniTensor,
};
use ptxsim::Report;

use super::fixture::{CANARY, HEADS, Random, Rows};
use super::fixture::{kernel, launch, no_state, open_rows, rows_of, run};
use super::model::rounded_sigma;
use crate::common::narrow;
use crate::common::simulator::Simulator;

pub const SLOTS: usize = 3;
/// Tokens of NaN behind the last of a batch.
pub const PADDING: usize = 40;

/// What a run of prefill works on.
pub struct Prefill<T> {
    pub sim: Simulator,
    pub problem: InfiniProblem,
    pub dims: (usize, usize),
    pub n: usize,
    pub splits: usize,
    pub split_len: usize,
    pub k: Rows<T>,
    pub v: Rows<T>,
    pub open: (Vec<T>, Vec<T>),
    pub tensors: (InfiniTensor, InfiniTensor),
    pub state: InfiniState,
    pub pieces: Vec<InfiniPiece>,
    pub chains: Vec<InfiniChain>,
    pub run: InfiniRun,
}

/// Mean and deviation of keys and of values.
#[derive(Clone, Copy)]
pub struct Scale {
    pub k: (f32, f32),
    pub v: (f32, f32),
}

pub const NORMAL: Scale = Scale { k: (0.0, 1.0), v: (0.3, 1.0) };

/// Pieces of a chain: (first token, new tokens, tokens of the open segment).
pub fn chain(
    pieces: &mut Vec<InfiniPiece>,
    n: usize,
    (slot, batch, empty): (i32, i32, bool),
    parts: &[(usize, usize, usize)],
) -> InfiniChain {
    let first_piece = pieces.len() as i32;
    let mut empty_now = empty;
    for &(first, len, cached) in parts {
        let full = cached + len == n;
        pieces.push(InfiniPiece {
            first: first as i64,
            position: first as i64,
            slot,
            batch,
            len: len as i32,
            cached: cached as i32,
            full: full.into(),
            empty: empty_now.into(),
        });
        empty_now &= !full;
    }
    InfiniChain {
        slot,
        first_piece,
        pieces: parts.len() as i32,
        empty: empty.into(),
        ends: 1,
        ..InfiniChain::default()
    }
}

impl<T: Element> Prefill<T> {
    pub fn new(
        dims: (usize, usize),
        problem: InfiniProblem,
        (splits, split_len): (usize, usize),
        scale: Scale,
        (pieces, chains): (Vec<InfiniPiece>, Vec<InfiniChain>),
    ) -> Self {
        let (dk, dv) = dims;
        let n = problem.segment_len as usize;
        let mut sim = Simulator::new();
        let mut random = Random::new(7 + dk as u64 * 1000 + dv as u64);
        let batches = pieces.iter().map(|p| p.batch as usize + 1).max().unwrap_or(0);
        let tokens = pieces.iter().map(|p| p.first as usize + p.len as usize).max().unwrap_or(0);
        let mut rows = |dim: usize, (mean, deviation)| {
            let values = random.normal(batches * tokens * HEADS * dim, mean, deviation);
            Rows::<T>::new(&values, tokens, dim)
        };
        let (k, v) = (rows(dk, scale.k), rows(dv, scale.v));
        let mut cached = [0; SLOTS];
        for piece in &pieces {
            cached[piece.slot as usize] = cached[piece.slot as usize].max(piece.cached as usize);
        }
        let open = (
            open_rows::<T>(&mut random, &cached, n, dk, scale.k),
            open_rows::<T>(&mut random, &cached, n, dv, scale.v),
        );
        let tensors = (k.upload(&mut sim, "k", PADDING), v.upload(&mut sim, "v", PADDING));
        let state = InfiniState {
            open_k: sim.upload("open_k", &open.0),
            open_v: sim.upload("open_v", &open.1),
            ..no_state(SLOTS)
        };
        let run = run(&mut sim, &pieces, &chains);
        Self {
            sim,
            problem,
            dims,
            n,
            splits,
            split_len,
            k,
            v,
            open,
            tensors,
            state,
            pieces,
            chains,
            run,
        }
    }

    /// σ(K), rounded, and V of a piece's segment.
    pub fn segment(&self, piece: usize, head: usize) -> (Vec<f64>, Vec<f64>) {
        let p = &self.pieces[piece];
        let (first, len, cached) = (p.first as usize, p.len as usize, p.cached as usize);
        let slot = p.slot as usize;
        let rows = |open: &[T], new: &Rows<T>, dim| {
            let mut rows = rows_of(open, self.n, dim, slot, head, cached);
            rows.extend(new.rows(p.batch as usize, first, len, head));
            rows
        };
        let k = rows(&self.open.0, &self.k, self.dims.0);
        (rounded_sigma::<T>(&k), rows(&self.open.1, &self.v, self.dims.1))
    }

    pub fn records(&self) -> usize {
        self.pieces.len() * HEADS
    }

    pub fn filled(&mut self, name: &str, count: usize) -> u64 {
        self.sim.upload(name, &vec![CANARY; count])
    }

    /// Phase 1, with or without values. (b, sums)
    pub fn segment_state(&mut self, values: bool) -> (u64, u64, Report) {
        let (dk, dv) = self.dims;
        let parts = self.records() * self.splits;
        let b = if values { self.filled("b", parts * dk * dv) } else { 0 };
        let sums = self.filled("sums", parts * dk);
        let kernel = kernel("segment_state", T::DTYPE, dk, dv);
        let grid = [self.splits, HEADS * dv / kernel.columns, self.pieces.len()];
        let params = InfiniSegmentState {
            problem: self.problem,
            k: self.tensors.0,
            v: if values { self.tensors.1 } else { InfiniTensor::default() },
            state: self.state,
            run: self.run,
            splits: self.splits as i32,
            split_len: self.split_len as i32,
            b,
            sums,
        };
        (b, sums, launch(&mut self.sim, kernel, grid, &params))
    }

    /// Phase 2. (z before every piece, report)
    pub fn normaliser_scan(&mut self, sums: u64, start: u64, end: u64) -> (u64, Report) {
        let dk = self.dims.0;
        let z = self.sim.uninitialised::<f32>("z", self.records() * dk);
        let params = InfiniNormaliserScan {
            problem: self.problem,
            run: self.run,
            splits: self.splits as i32,
            reserved: 0,
            sums,
            z,
            start,
            end,
        };
        let kernel = kernel("normaliser_scan", T::DTYPE, dk, 0);
        (z, launch(&mut self.sim, kernel, [HEADS, self.chains.len(), 1], &params))
    }

    /// Phase 3. (g, g_scale)
    pub fn segment_transition(&mut self, z: u64) -> (u64, u64, Report) {
        let dk = self.dims.0;
        let canary: Vec<T> = narrow(&vec![CANARY; self.records() * dk * dk]);
        let g = self.sim.upload("g", &canary);
        let g_scale = self.filled("g_scale", self.records() * dk / 16);
        let params = InfiniSegmentTransition {
            problem: self.problem,
            k: self.tensors.0,
            state: self.state,
            run: self.run,
            z,
            g,
            g_scale,
        };
        let kernel = kernel("segment_transition", T::DTYPE, dk, 0);
        let grid = [dk / kernel.columns, HEADS, self.pieces.len()];
        (g, g_scale, launch(&mut self.sim, kernel, grid, &params))
    }

    /// Phase 4.
    pub fn memory_scan(&mut self, scan: InfiniMemoryScan) -> Report {
        let kernel = kernel("memory_scan", T::DTYPE, self.dims.0, 0);
        let grid = [scan.columns as usize / kernel.columns, HEADS, self.chains.len()];
        let params = InfiniMemoryScan {
            problem: self.problem,
            run: self.run,
            splits: self.splits as i32,
            ..scan
        };
        launch(&mut self.sim, kernel, grid, &params)
    }

    pub fn read(&self, address: u64, count: usize) -> Vec<f32> {
        self.sim.read(address, count)
    }
}
