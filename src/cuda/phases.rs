//! Phases of a run of segments that needs no state: those that key sums and maps are made of.

use std::ops::Range;

use bytemuck::Zeroable;

use super::address::Bytes;
use super::call::problem_params;
use super::maps::MapAddresses;
use super::params::*;
use super::plan::{Allocation, Plan};
use super::prefill::splits;
use super::{DeviceTensor, Operand, PrefillOptions, find};
use crate::{Problem, Result, Update};

/// Keys and values [B, T, Hkv, D] that are cut into segments, all of them complete.
pub(super) struct Segments {
    pub p: Problem,
    pub k: InfiniTensor,
    /// Absent: sums only.
    pub v: InfiniTensor,
    /// Parts of a segment that are summed apart, and the tokens of each.
    pub splits: usize,
    pub split_len: usize,
}

/// Pieces and chains of one run: of every sequence the same range of tokens.
pub(super) struct Table {
    pub pieces: Vec<InfiniPiece>,
    chains: Vec<InfiniChain>,
    /// Pieces that find a memory.
    transits: usize,
}

/// Arrays of a run in the workspace, one record per piece; 0 where there is none.
pub(super) struct Arrays {
    b: u64,
    sums: u64,
    z: u64,
    g: u64,
    g_scale: u64,
}

impl Table {
    pub fn copy(&self, plan: &mut Plan, workspace: &mut Allocation) -> Result<InfiniRun> {
        let run = InfiniRun {
            pieces: workspace.part(&[self.pieces.len()], size_of::<InfiniPiece>())?,
            chains: workspace.part(&[self.chains.len()], size_of::<InfiniChain>())?,
            piece_count: self.pieces.len() as i32,
            chain_count: self.chains.len() as i32,
        };
        plan.copy(run.pieces, Bytes::plain(&self.pieces));
        plan.copy(run.chains, Bytes::plain(&self.chains));
        Ok(run)
    }
}

impl Arrays {
    /// For [`Segments::state`] without values and [`Segments::normaliser`].
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
    pub fn new(segments: &Segments, pieces: usize, workspace: &mut Allocation) -> Result<Self> {
        let (p, splits) = (&segments.p, segments.splits);
        let (h, dk, dv) = (p.kv_heads(), p.key_dim(), p.value_dim());
        let delta = if p.update() == Update::Delta { pieces } else { 0 };
        Ok(Self {
            b: workspace.part(&[pieces, h, splits, dk, dv], 4)?,
            g: workspace.part(&[delta, h, dk, dk], p.dtype().bytes())?,
            g_scale: workspace.part(&[delta, h, dk / 16], 4)?,
            ..Self::for_sums(p, splits, pieces, workspace)?
        })
    }

    /// Segments of every sequence that run together, of `all`: no more than the budget holds, in runs
    /// of about the same length.
    pub fn segments_per_run(
        segments: &Segments,
        batch: usize,
        all: usize,
        options: &PrefillOptions,
    ) -> Result<usize> {
        /// A grid's z.
        const MOST: u64 = 65_535;
        let mut one = Allocation::new(Operand::Workspace);
        Self::new(segments, 1, &mut one)?;
        let fit = (options.workspace_bytes / one.bytes()).min(MOST) / batch.max(1) as u64;
        let fit = usize::try_from(fit).unwrap_or(usize::MAX).max(1);
        Ok(all.div_ceil(all.div_ceil(fit).max(1)).max(1))
    }
}

impl Segments {
    pub fn new(
        p: &Problem,
        k: &DeviceTensor,
        v: &DeviceTensor,
        options: &PrefillOptions,
    ) -> Result<Self> {
        let columns = find("segment_state", p)?.columns;
        let (splits, split_len) = splits(p, columns, options.multiprocessors);
        Ok(Self { p: *p, k: k.rows(Operand::K), v: v.rows(Operand::V), splits, split_len })
    }

    /// The tokens `range` of every sequence in segments of `len`; `empty`: which sequences find no
    /// memory.
    pub fn table(&self, empty: &[bool], range: Range<usize>, len: usize) -> Table {
        let delta = self.p.update() == Update::Delta;
        let mut table = Table { pieces: Vec::new(), chains: Vec::new(), transits: 0 };
        for (b, &empty) in empty.iter().enumerate() {
            let first_piece = table.pieces.len();
            for first in range.clone().step_by(len) {
                let empty = empty && first == range.start;
                table.transits += usize::from(delta && !empty);
                table.pieces.push(InfiniPiece {
                    first: first as i64,
                    position: 0,
                    slot: b as i32,
                    batch: b as i32,
                    len: len.min(range.end - first) as i32,
                    cached: 0,
                    full: 1,
                    empty: empty.into(),
                });
            }
            table.chains.push(InfiniChain {
                slot: b as i32,
                first_piece: first_piece as i32,
                pieces: (table.pieces.len() - first_piece) as i32,
                empty: empty.into(),
                ..Zeroable::zeroed()
            });
        }
        table
    }

    /// B and column sums of σ(K) of every piece.
    pub fn state(&self, table: &Table, run: InfiniRun, at: &Arrays, plan: &mut Plan) -> Result<()> {
        let kernel = find("segment_state", &self.p)?;
        let params = InfiniSegmentState {
            problem: problem_params(&self.p),
            k: self.k,
            v: self.v,
            state: Zeroable::zeroed(), // nothing lies in an open segment
            run,
            splits: self.splits as i32,
            split_len: self.split_len as i32,
            b: at.b,
            sums: at.sums,
        };
        let slices = if self.v.data == 0 { 1 } else { self.p.value_dim() / kernel.columns };
        let why = format!("{} parts of {} tokens", self.splits, self.split_len);
        let grid = [self.splits, self.p.kv_heads() * slices, table.pieces.len()];
        plan.launch(kernel, grid, params, why)
    }

    /// z before every piece from `start`, [B, Hkv, Dk], and after the run in `end`.
    pub fn normaliser(
        &self,
        table: &Table,
        run: InfiniRun,
        at: &Arrays,
        start: u64,
        end: u64,
        plan: &mut Plan,
    ) -> Result<()> {
        let params = InfiniNormaliserScan {
            problem: problem_params(&self.p),
            run,
            splits: self.splits as i32,
            reserved: 0,
            sums: at.sums,
            z: at.z,
            start,
            end,
        };
        let grid = [self.p.kv_heads(), table.chains.len(), 1];
        plan.launch(find("normaliser_scan", &self.p)?, grid, params, "sums before every segment")
    }

    /// G of every piece that finds a memory.
    pub fn transition(
        &self,
        table: &Table,
        run: InfiniRun,
        at: &Arrays,
        plan: &mut Plan,
    ) -> Result<()> {
        if table.transits == 0 {
            return Ok(());
        }
        let kernel = find("segment_transition", &self.p)?;
        let params = InfiniSegmentTransition {
            problem: problem_params(&self.p),
            k: self.k,
            state: Zeroable::zeroed(),
            run,
            z: at.z,
            g: at.g,
            g_scale: at.g_scale,
        };
        let slices = self.p.key_dim() / kernel.columns;
        let grid = [slices, self.p.kv_heads(), table.pieces.len()];
        plan.launch(kernel, grid, params, format!("{} segments find a memory", table.transits))
    }

    /// A and B of the run from the identity and 0, or behind those of the run before.
    pub fn scan_maps(
        &self,
        table: &Table,
        run: InfiniRun,
        at: &Arrays,
        first: bool,
        map: MapAddresses,
        plan: &mut Plan,
    ) -> Result<()> {
        let kernel = find("memory_scan", &self.p)?;
        let (g, g_scale) = if table.transits > 0 { (at.g, at.g_scale) } else { (0, 0) };
        for (why, kind, b, end, columns) in [
            ("A", INFINI_START_IDENTITY, 0, map.a, self.p.key_dim()),
            ("B", INFINI_START_ZERO, at.b, map.b, self.p.value_dim()),
        ] {
            let params = InfiniMemoryScan {
                problem: problem_params(&self.p),
                run,
                splits: self.splits as i32,
                start_kind: (if first { kind } else { INFINI_START_MEMORY }) as i32,
                b,
                g,
                g_scale,
                start: end,
                end,
                columns: columns as i64,
                ..Zeroable::zeroed()
            };
            let grid = [columns / kernel.columns, self.p.kv_heads(), table.chains.len()];
            plan.launch(kernel, grid, params, why)?;
        }
        Ok(())
    }
}
