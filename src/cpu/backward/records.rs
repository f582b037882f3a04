//! M, z and G of the segments of a run, computed again from what its first segment found.

use std::ops::Range;

use super::{Backward, WORKSPACE};
use crate::alloc;
use crate::cpu::segment::{self, Scratch as SegmentScratch, advance_memory, transits};
use crate::dtype::Element;
use crate::error::Result;
use crate::problem::{Problem, Update};

/// What a piece and KV head has in a run: the M and z it found; under the delta rule G.
#[derive(Clone, Copy)]
pub(super) struct Record {
    m: usize,
    z: usize,
    g: usize,
}

impl Record {
    pub fn new(p: &Problem) -> Self {
        let (dk, dv) = (p.key_dim(), p.value_dim());
        Self { m: dk * dv, z: dk, g: if p.update() == Update::Delta { dk * dk } else { 0 } }
    }

    /// Floats.
    pub fn len(&self) -> usize {
        self.m + self.z + self.g
    }

    /// (m, z, g).
    pub fn split<'r>(&self, record: &'r [f32]) -> (&'r [f32], &'r [f32], &'r [f32]) {
        let (m, rest) = record.split_at(self.m);
        let (z, g) = rest.split_at(self.z);
        (m, z, g)
    }

    /// The same, to write to.
    pub fn split_mut<'r>(
        &self,
        record: &'r mut [f32],
    ) -> (&'r mut [f32], &'r mut [f32], &'r mut [f32]) {
        let (m, rest) = record.split_at_mut(self.m);
        let (z, g) = rest.split_at_mut(self.z);
        (m, z, g)
    }
}

/// Buffers of one running task.
pub(super) struct Scratch {
    segment: SegmentScratch,
    /// The memory as it is walked through, and B and Δz of a segment.
    m: Vec<f32>,
    z: Vec<f32>,
    b: Vec<f32>,
    dz: Vec<f32>,
}

impl Scratch {
    pub fn new(p: &Problem) -> Result<Self> {
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let floats = |len| alloc::zeroed(&[len], WORKSPACE);
        Ok(Self {
            segment: SegmentScratch::new(p)?,
            m: floats(dk * dv)?,
            z: floats(dk)?,
            b: floats(dk * dv)?,
            dz: floats(dk)?,
        })
    }

    /// Stands where the memory is (m, z).
    pub fn begin(&mut self, (m, z): (&[f32], &[f32])) {
        self.m.copy_from_slice(m);
        self.z.copy_from_slice(z);
    }

    /// The memory where it stands.
    pub fn memory(&self) -> (&[f32], &[f32]) {
        (&self.m, &self.z)
    }
}

impl<T: Element> Backward<'_, T> {
    /// Records of the pieces `run` of sequence `i` and a KV head, of which the first found what `x` holds.
    /// Behind `end` nothing is needed; before it `x` comes to hold what the piece after the run finds.
    pub(super) fn record(
        &self,
        (i, kv_head): (usize, usize),
        (run, end): (Range<usize>, usize),
        records: &mut [f32],
        x: &mut Scratch,
    ) {
        let (p, record) = (&self.problem, Record::new(&self.problem));
        for (j, chunk) in run.zip(records.chunks_exact_mut(record.len())) {
            let piece = self.piece(i, j);
            let (m, z, g) = record.split_mut(chunk);
            m.copy_from_slice(&x.m);
            z.copy_from_slice(&x.z);
            if !piece.full || self.cancel.abandons() {
                continue;
            }
            let tokens = self.tokens(&piece, kv_head);
            if transits(p, &piece) {
                segment::transition(p, &tokens, z, g, &mut x.segment);
            }
            if j + 1 == end {
                continue;
            }
            if let Some(next) = self.tape.found(&self.piece(i, j + 1), kv_head) {
                x.begin(next);
            } else {
                segment::sums(p, &tokens, &mut x.b, &mut x.dz, &mut x.segment);
                advance_memory(p, &piece, &mut x.b, g, &mut x.m);
                x.z.iter_mut().zip(&x.dz).for_each(|(z, dz)| *z += dz);
            }
        }
    }
}
