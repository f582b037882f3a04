//! What a case feeds into an implementation: its streams, and the arguments of its calls.

use infini_attn::{Element, Problem};

use super::buffers::{Arrangement, Strided};
use super::call::{Call, CallRope, CallShape, TABLE_ROWS};
use super::cases::{Case, Gate, Positions};
use super::stream::{Stream, normals, rope_tables};

/// The data of a case in one element type.
pub struct Data<'a, T> {
    case: &'a Case,
    pub gate: Vec<f32>,
    /// Rotation tables.
    pub tables: Option<(&'a [f32], &'a [f32])>,
    pub streams: Vec<Stream<T>>,
    /// Table row of every token, per sequence.
    pub positions: Vec<Vec<i64>>,
    /// Guard elements between the rows of strided buffers.
    margin: usize,
}

/// The rotation tables of a case.
pub fn tables(case: &Case) -> Option<(Vec<f32>, Vec<f32>)> {
    case.rope.map(|r| rope_tables(TABLE_ROWS, r.channels, r.magnitude))
}

impl<'a, T: Element> Data<'a, T> {
    pub fn new(case: &'a Case, tables: Option<(&'a [f32], &'a [f32])>, margin: usize) -> Self {
        let heads = case.problem.heads();
        let gate = match case.gate {
            Gate::Normal => normals(case.seed, heads),
            Gate::Of(list) => list.iter().copied().cycle().take(heads).collect(),
        };
        let streams = (0..case.sequences()).map(|b| stream(case, b)).collect();
        Self { case, gate, tables, streams, positions: positions(case), margin }
    }

    pub fn slot(&self, sequence: usize) -> usize {
        self.case.slots.as_ref().map_or(sequence, |(slots, _)| slots[sequence])
    }

    /// Buffers of NaN for q, k and v.
    pub fn buffers(&self, lead: &[usize], how: Arrangement) -> [Strided<T>; 3] {
        let p = &self.case.problem;
        let (hq, hkv) = (p.heads(), p.kv_heads());
        [(hq, p.key_dim()), (hkv, p.key_dim()), (hkv, p.value_dim())].map(|(heads, dim)| {
            Strided::with_margin(&[lead, &[heads, dim]].concat(), how, f32::NAN, self.margin)
        })
    }

    /// Arguments of one call; everything that belongs to no token is NaN.
    pub fn assemble(&self, shape: &CallShape, lens: &[usize], seen: &[usize]) -> Call<'a, T> {
        let case = self.case;
        let [q, k, v] = self.buffers(&shape.lead, case.arrangement);
        let sum = |b: usize| lens[..b].iter().sum::<usize>() as i32;
        let rope = case.rope.zip(self.tables).map(|(rotation, (cos, sin))| CallRope {
            rotation,
            cos,
            sin,
            positions: self.call_positions(shape, lens, seen),
        });
        let mut call = Call {
            q,
            k,
            v,
            batch: case.batch,
            lens: lens.iter().map(|&n| n as i32).collect(),
            ranges: shape.ranges(lens),
            cu: (0..=lens.len()).map(sum).collect(),
            slots: case.slots.as_ref().map(|(slots, _)| slots.clone()),
            rope,
        };
        for (b, &len) in lens.iter().enumerate() {
            for t in 0..len {
                let at = shape.token(b, t);
                fill(&case.problem, &mut call, &at, &self.streams[b], seen[b] + t);
            }
        }
        call
    }

    /// Explicit table rows of one call; padding gets one that must not be read.
    fn call_positions(
        &self,
        shape: &CallShape,
        lens: &[usize],
        seen: &[usize],
    ) -> Option<Vec<i64>> {
        let kind = self.case.rope?.positions;
        if kind == Positions::Continued {
            return None;
        }
        let shared = kind == Positions::Shared && shape.lead.len() == 2;
        let count = if shared { shape.lead[1] } else { shape.lead.iter().product() };
        let mut list = vec![i64::MIN; count];
        for (b, &len) in lens.iter().enumerate() {
            for t in 0..len {
                let at = shape.token(b, t);
                let i = if shared || at.len() == 1 {
                    at[at.len() - 1]
                } else {
                    at[0] * shape.lead[1] + at[1]
                };
                list[i] = self.positions[b][seen[b] + t];
            }
        }
        Some(list)
    }

    /// Tokens of sequence `b` from flush point to flush point, and whether a flush follows.
    pub fn runs(&self, b: usize) -> Vec<(std::ops::Range<usize>, bool)> {
        let case = self.case;
        let mut start = 0;
        (case.flush_after.iter().copied().chain([case.calls.len() - 1]))
            .map(|last| {
                let end: usize = case.calls[..=last].iter().map(|c| c[b]).sum();
                let range = start..end;
                start = end;
                (range, case.flush_after.contains(&last))
            })
            .collect()
    }
}

/// Puts token `t` of a stream into a call's buffers, at leading indices `at`.
pub fn fill<T: Element>(
    p: &Problem,
    call: &mut Call<'_, T>,
    at: &[usize],
    from: &Stream<T>,
    t: usize,
) {
    for (buffer, data, heads, dim) in [
        (&mut call.q, &from.q, p.heads(), p.key_dim()),
        (&mut call.k, &from.k, p.kv_heads(), p.key_dim()),
        (&mut call.v, &from.v, p.kv_heads(), p.value_dim()),
    ] {
        for h in 0..heads {
            buffer.set_row(&[at, &[h]].concat(), &data[(t * heads + h) * dim..][..dim]);
        }
    }
}

fn stream<T: Element>(case: &Case, sequence: usize) -> Stream<T> {
    let values = case.values;
    let seed = case.seed * 16 + sequence as u64;
    Stream::from_fn(&case.problem, case.tokens(sequence), seed, |which, x| {
        let i = "qkv".find(which).expect("one of q, k, v");
        values.scale[i] * x + values.shift[i]
    })
}

/// Table row of every token of every sequence.
fn positions(case: &Case) -> Vec<Vec<i64>> {
    let kind = case.rope.map_or(Positions::Continued, |r| r.positions);
    (0..case.sequences())
        .map(|b| {
            let of_call = |(i, lens): (usize, &Vec<usize>)| {
                let shape = CallShape::new(case.batch, lens);
                (0..lens[b]).map(move |t| match (kind, &shape.token(b, t)[..]) {
                    (Positions::Continued, _) => None,
                    (Positions::Shared, [_, t]) => Some((i * 37 + t * 3) % TABLE_ROWS),
                    // Packed tokens share no index, so there the list is per token as well.
                    (Positions::Shared, _) => Some((i * 37 + t * 3) % TABLE_ROWS),
                    (Positions::PerToken, _) => Some((i * 131 + b * 29 + t * 17) % TABLE_ROWS),
                })
            };
            let all = case.calls.iter().enumerate().flat_map(of_call);
            all.enumerate().map(|(t, given)| given.unwrap_or(t) as i64).collect()
        })
        .collect()
}
