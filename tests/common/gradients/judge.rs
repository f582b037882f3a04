//! The reference's gradients of a case, and how near an implementation must come to them.

use std::ops::Range;

use infini_attn::reference::{self, OpenGradient, Output, StateGradient};
use infini_attn::{DType, Element, Inputs, Problem, Result};

use super::{Differentiable, Graph, Run, of_slot, widths};
use crate::common::call::rope;
use crate::common::metric::{Axes, relative_rms, rms_above};
use crate::common::tolerance::{STATE_TOLERANCE, output_tolerance};
use crate::common::widen;

impl<T: Element, D: Differentiable> Run<'_, T, D> {
    /// The reference over a sequence alone, from flush to flush; truncated propagation counts its
    /// segments by calls.
    pub fn judge(
        &mut self,
        b: usize,
        graph: &Graph<'_, T, D::Tape>,
        end: &StateGradient,
        state: &mut reference::State,
    ) {
        let p = &self.case.problem;
        let [m, z, open] = of_slot(end, self.data.slot(b));
        let k = p.kv_heads() * p.key_dim();
        let row = |row: &[f64]| OpenGradient {
            k: row[..k].to_vec(),
            k_rotated: row[k..2 * k].to_vec(),
            v: row[2 * k..].to_vec(),
        };
        let width = 2 * k + p.kv_heads() * p.value_dim();
        let mut gradient =
            StateGradient { m, z, open: vec![open.chunks(width).map(row).collect()] };
        let ranges: Vec<Range<usize>> =
            graph.iter().map(|s| s.seen[b]..s.seen[b] + s.lens[b]).collect();
        let whole = ranges[0].start..ranges[ranges.len() - 1].end;
        let ranges = if self.bptt_segments.is_some() { ranges } else { vec![whole] };
        let mut states = vec![];
        for range in &ranges {
            states.push(state.clone());
            let out = self.reference(b, range, state, |p, inputs, gate, state, _| {
                reference::prefill(p, inputs, gate, state)
            });
            self.measure(b, range, &out);
        }
        let mut parts: [Vec<f64>; 3] = Default::default();
        for (range, state) in ranges.iter().zip(&mut states).rev() {
            let bptt = self.bptt_segments;
            let got = self.reference(b, range, state, |p, inputs, gate, state, up| {
                reference::prefill_backward(p, inputs, gate, state, up, &mut gradient, bptt)
            });
            for (all, part) in parts.iter_mut().zip([got.q, got.k, got.v]) {
                all.splice(0..0, part);
            }
            self.gate[1].iter_mut().zip(got.gate).for_each(|(sum, x)| *sum += x);
        }
        for (all, part) in self.want[b].main.iter_mut().zip(parts) {
            all.extend(part);
        }
        self.want[b].memory.push([gradient.m, gradient.z]);
    }

    /// Something of the reference, with a sequence's inputs and upstream gradients.
    fn reference<R>(
        &self,
        b: usize,
        range: &Range<usize>,
        state: &mut reference::State,
        work: impl FnOnce(&Problem, &Inputs<'_, T>, &[f32], &mut reference::State, &Output) -> Result<R>,
    ) -> R {
        let (p, up) = (&self.case.problem, &self.upstream[b]);
        let stream = self.data.streams[b].slice(range.clone());
        let mut inputs = stream.inputs();
        if let (Some(rotation), Some((cos, sin))) = (&self.case.rope, self.data.tables) {
            let positions = &self.data.positions[b][range.clone()];
            inputs = inputs.rope(rope(rotation, cos, sin, Some(positions)));
        }
        let (heads, width) = (p.heads(), p.heads() * p.value_dim());
        let main = |i: usize| widen(&up.main[i][range.start * width..range.end * width]);
        let lse =
            |i: usize| f64::from(up.lse[(range.start + i % range.len()) * heads + i / range.len()]);
        let lse = (0..range.len() * heads).map(lse).collect();
        let up = Output { o: main(0), a_dot: main(1), a_mem: main(2), lse };
        work(p, &inputs, &self.data.gate, state, &up).expect("the reference")
    }

    /// The largest log-sum-exp, and what dβ is a sum of: g G·(A_mem − A), a difference again, of A in the
    /// problem's type.
    fn measure(&mut self, b: usize, range: &Range<usize>, out: &Output) {
        let p = &self.case.problem;
        self.largest_lse = out.lse.iter().fold(self.largest_lse, |most, lse| most.max(lse.abs()));
        let (heads, dv) = (p.heads(), p.value_dim());
        for (i, a) in out.o.iter().enumerate() {
            let g = 1.0 / (1.0 + (-f64::from(self.data.gate[i / dv % heads])).exp());
            let d_o: f64 = self.upstream[b].main[0][range.start * heads * dv + i].into();
            self.gate_terms += (g * d_o * a).powi(2);
        }
    }

    pub fn compare(&mut self) {
        let (case, p) = (self.case, &self.case.problem);
        // P is made again from a log-sum-exp of f32.
        let limit =
            output_tolerance(p.dtype()) + 3.0 * self.largest_lse * f64::from(f32::EPSILON) / 2.0;
        let segment = case.flush_after.is_empty().then_some(p.segment_len());
        let mut checks = std::mem::take(&mut self.checks);
        for (b, (got, want)) in self.got.iter().zip(&self.want).enumerate() {
            let mut check = |name, result: std::result::Result<f64, String>| {
                let result = result.map_err(|e| format!("sequence {b}: {e}"));
                checks.push(result.map(|rms| (name, rms)));
            };
            let floors = self.floors(b);
            for (i, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
                let [heads, dim] = widths(p)[i];
                let shape = [case.tokens(b), heads, dim];
                let axes = Axes::tokens(&shape, segment);
                check(name, rms_above(name, &got.main[i], &want.main[i], axes, limit, floors[i]));
            }
            let memory = [p.kv_heads(), p.key_dim(), p.value_dim()];
            for ([m, z], [want_m, want_z]) in got.memory.iter().zip(&want.memory) {
                let limit = if p.dtype() == DType::F32 { STATE_TOLERANCE } else { limit };
                check("dM", relative_rms("dM", m, want_m, Axes::memory(&memory), limit));
                check("dz", relative_rms("dz", z, want_z, Axes::memory(&memory[..2]), limit));
            }
        }
        // A sum of random signs: relative to what it is without luck.
        let ([got, want], scale) = (&self.gate, (self.gate_terms / p.heads() as f64).sqrt());
        let result = rms_above("dgate", got, want, &[p.heads()], limit, scale);
        checks.push(result.map(|rms| ("dgate", rms)));
        self.checks = checks;
    }

    /// Least scales of dq, dk and dv. What the softmax passes on to q and k is a difference, of G·V and
    /// G·A, which is 0 for a row that sees a single token: rounding is relative to what it is a difference
    /// of, with A in the problem's type.
    fn floors(&self, b: usize) -> [f64; 3] {
        let (p, stream) = (&self.case.problem, &self.data.streams[b]);
        let square = |x: f64| x * x;
        let rms = |x: &[T]| {
            let sum: f64 = x.iter().map(|&x| square(x.into())).sum();
            (sum / x.len().max(1) as f64).sqrt()
        };
        let difference = p.scale().abs() * (p.value_dim() as f64).sqrt() * rms(&stream.v);
        let magnitude = self.case.rope.map_or(1.0, |r| r.magnitude * r.magnitude);
        // In f32 arithmetic a row's rounding errors are not all of one sign.
        let spread = match p.dtype() {
            DType::F32 => (p.segment_len().min(stream.tokens.max(1)) as f64).sqrt(),
            _ => 1.0,
        };
        let floor = 0.5 * magnitude * difference / spread;
        [floor * rms(&stream.k), floor * rms(&stream.q) * (p.group() as f64).sqrt(), 0.0]
    }
}
