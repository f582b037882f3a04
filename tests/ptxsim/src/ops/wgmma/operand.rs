//! The operands of a product in shared memory: where they lie, what is known of their bytes, and
//! their values.

use super::group::{self, Issuer, Operation};
use super::{M, Product};
use crate::access::{Actor, Region, Window};
use crate::clock::{self, ALL_LANES, Epoch, WarpClock};
use crate::context::Cx;
use crate::diagnostic::Kind;
use crate::layout::{Descriptor, Major};
use crate::memory::SharedMemory;
use crate::numeric::convert::tf32_operand;
use crate::ops::mma::Element;
use crate::shadow::Proxy;

/// Bytes of a chunk of an operand.
const CHUNK: u32 = 16;
/// Rows of A.
const ROWS: usize = 64;

/// One operand, by rows of A or of the transpose of B.
pub struct Matrix {
    rows: usize,
    major: Major,
    /// Addresses of the chunks. K-major: [row][k / 8]; MN-major: [k][row / 8].
    chunks: Vec<u32>,
    /// Rows all of whose bytes have been written.
    pub defined: Vec<bool>,
    /// Row by row, once they have been read.
    pub values: Vec<f32>,
}

impl Operation {
    /// All four warps have issued it: records that it reads its operands, and reads them unless
    /// that is put off. None after a report with which the launch ends.
    pub fn start(&mut self, cx: &mut Cx<'_, '_>) -> Option<()> {
        let issuers = std::mem::take(&mut self.issuers);
        let [a_major, b_major] = self.product.majors;
        let (a, b) = self.descriptors;
        let b = Matrix::find(cx, b, self.product.n, b_major)?;
        let a = match a {
            None => None,
            Some(a) => Some(Matrix::find(cx, a, ROWS, a_major)?),
        };
        if cx.grid.options.checks {
            let actor = clock::Actor::wgmma(group::first_warp(cx));
            let epoch = Epoch { actor, clock: self.group, lanes: ALL_LANES };
            for i in 0..issuers.len() {
                let rows = a.iter().flat_map(|a| a.of_warp(issuers[i].place));
                record(cx, rows.chain(b.chunks.iter().copied()), &issuers, i, epoch);
            }
        }
        self.operands = Some((a, b));
        if !cx.grid.options.timing.is_lazy() {
            self.read(&cx.gang.blocks[cx.warp.block].shared);
        }
        Some(())
    }

    /// Reads the operands, once.
    pub fn read(&mut self, shared: &SharedMemory) {
        let Some((a, b)) = &mut self.operands else { return };
        if let Some(a) = a {
            a.read(shared, &self.product, self.product.negate[0]);
        }
        b.read(shared, &self.product, self.product.negate[1]);
    }
}

/// Records reads for issuer number `i`. What another warp wrote and fenced before its wgmma.fence is
/// in order too if the product is one operation, as on hardware; the text of the rules does not
/// promise it.
fn record(
    cx: &mut Cx<'_, '_>,
    chunks: impl Iterator<Item = u32>,
    issuers: &[Issuer],
    i: usize,
    epoch: Epoch,
) {
    let lane = cx.mask.trailing_zeros() & 31;
    let actor = Actor { lane, epoch, proxy: Proxy::Async, strong: None };
    let clock = &issuers[i].clock;
    let mut all: Option<WarpClock> = None;
    for address in chunks {
        let region = Region::Shared { block: cx.warp.block, address };
        let Err(own) = cx.read_by(region, CHUNK, actor, clock) else { continue };
        let all = all.get_or_insert_with(|| {
            let mut all = clock.clone();
            issuers.iter().for_each(|issuer| all.acquire(ALL_LANES, &issuer.fence));
            all
        });
        let (race, what, forgiven) = match cx.read_by(region, CHUNK, actor, all) {
            Err(race) => (race, "wgmma operand", cx.is_forgiven(region, &race)),
            Ok(()) => {
                let what = "wgmma operand, which the wgmma.fence of another warp alone covers";
                (own, what, !cx.grid.options.strict_proxies)
            }
        };
        if let Some(place) = cx.region_place(region) {
            cx.report_race(lane, &race, what, place, forgiven);
        }
    }
}

impl Matrix {
    /// The operand of a descriptor; None after a report.
    fn find(cx: &mut Cx<'_, '_>, bits: u64, rows: usize, major: Major) -> Option<Self> {
        let descriptor = match Descriptor::new(bits) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                cx.report(Kind::InvalidOperand, error.to_string());
                return None;
            }
        };
        let chunks = chunks(descriptor, rows as u32, major);
        let lane = cx.mask.trailing_zeros() & 31;
        let mut matrix =
            Self { rows, major, chunks, defined: vec![true; rows], values: Vec::new() };
        for i in 0..matrix.chunks.len() {
            let at = matrix.chunks[i].into();
            let region = cx.locate(lane, Window::Shared, at, CHUNK, CHUNK)?;
            if cx.holds_values(region, CHUNK, lane, "wgmma operand") {
                continue;
            }
            let rows = matrix.rows_of(i);
            matrix.defined[rows].fill(false);
        }
        Some(matrix)
    }

    /// The rows that chunk number `i` has a part of.
    fn rows_of(&self, i: usize) -> std::ops::Range<usize> {
        match self.major {
            Major::K => i / 2..i / 2 + 1,
            Major::Mn => {
                let first = i % (self.rows / 8) * 8;
                first..first + 8
            }
        }
    }

    /// The chunks of the 16 rows of a warp.
    fn of_warp(&self, warp: usize) -> impl Iterator<Item = u32> {
        let mine = move |i: &usize| self.rows_of(*i).start / M == warp;
        (0..self.chunks.len()).filter(mine).map(|i| self.chunks[i])
    }

    fn read(&mut self, shared: &SharedMemory, product: &Product, negate: bool) {
        if !self.values.is_empty() {
            return;
        }
        let k = product.k();
        let per_chunk = k / 2;
        let sign = if negate { -1.0 } else { 1.0 };
        let mut out = vec![0f32; self.rows * k];
        for (i, address) in self.chunks.iter().enumerate() {
            let bytes = &shared.data[shared.index(*address)..][..CHUNK as usize];
            let values = product.unpack(bytes, sign);
            match self.major {
                Major::K => {
                    let at = i * per_chunk;
                    out[at..at + per_chunk].copy_from_slice(&values[..per_chunk]);
                }
                Major::Mn => {
                    let (row, column) = (i % (self.rows / 8) * 8, i / (self.rows / 8));
                    let to = out[row * k..].chunks_exact_mut(k);
                    to.zip(values).for_each(|(row, v)| row[column] = v);
                }
            }
        }
        self.values = out;
    }
}

/// Addresses of an operand's chunks.
fn chunks(descriptor: Descriptor, rows: u32, major: Major) -> Vec<u32> {
    let at = |(mn, k)| descriptor.operand_address(mn, k, major);
    match major {
        Major::K => (0..rows).flat_map(|r| [at((r, 0)), at((r, 8))]).collect(),
        Major::Mn => (0..16).flat_map(|k| (0..rows / 8).map(move |c| (8 * c, k))).map(at).collect(),
    }
}

impl Product {
    /// The elements of a chunk, four or eight.
    fn unpack(&self, bytes: &[u8], sign: f32) -> [f32; 8] {
        let mut values = [0.0; 8];
        match self.element {
            Element::Half(kind) => {
                for (v, b) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *v = sign * kind.to_f32(u16::from_le_bytes(*b));
                }
            }
            Element::Tf32 => {
                for (v, b) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *v = sign * tf32_operand(u32::from_le_bytes(*b));
                }
            }
        }
        values
    }
}
