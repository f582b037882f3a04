//! What the other tests rest on: the table covers its axes, the metric fails when it must.

use crate::common::backend::Backend;
use crate::common::buffers::{OutputBuffers, Strided};
use crate::common::call::{Call, CallShape};
use crate::common::cases::{
    BATCHES, Case, DENOMINATORS, DIMS, DTYPES, EMPTY, RULES, SEGMENTS, cases,
};
use crate::common::driver::run_cases;
use crate::common::metric::{Axes, log_rms, relative_rms, rows_are_close};
use crate::common::plain::{Plain, Rows};
use crate::common::stream::Stream;
use crate::common::tensor_cases::{Shape, full, pairwise, work};
use crate::common::tolerance::Precision;
use crate::common::{narrow, scalar};
use infini_attn::{DType, Element, Problem, Result};

#[test]
fn the_table_covers_its_axes() {
    use std::collections::HashSet;
    let all = cases();
    let names: HashSet<&str> = all.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), all.len(), "names are unique");
    let has = |what: &str, f: &dyn Fn(&Case) -> bool| assert!(all.iter().any(f), "no case: {what}");
    for dtype in DTYPES {
        for update in RULES {
            for (empty, denominator) in EMPTY.into_iter().flat_map(|e| DENOMINATORS.map(|d| (e, d)))
            {
                has("policies", &|c| {
                    let p = &c.problem;
                    (p.dtype(), p.update(), p.empty_memory(), p.denominator())
                        == (dtype, update, empty, denominator)
                });
            }
        }
        for dims in DIMS {
            has("dims", &|c| {
                (c.problem.key_dim(), c.problem.value_dim()) == dims && c.problem.dtype() == dtype
            });
        }
        for batch in BATCHES {
            has("batch", &|c| c.batch == batch && c.problem.dtype() == dtype && c.sequences() > 1);
        }
    }
    for group in [1, 2, 4, 8] {
        has("group", &|c| c.problem.group() == group && c.problem.kv_heads() > 1);
    }
    for n in SEGMENTS {
        has("N", &|c| c.problem.segment_len() == n && c.tokens(0) > 2 * n);
        has("N by tokens", &|c| c.problem.segment_len() == n && c.calls.len() > 1);
    }
    for chunk in 1..=16 {
        has("decode chunk", &|c| c.largest_chunk() == chunk && c.calls.len() > 2);
    }
    has("flush", &|c| !c.flush_after.is_empty());
    has("untouched slots", &|c| c.slots.as_ref().is_some_and(|(s, n)| s.len() < *n));
    has("partial rope", &|c| c.rope.is_some_and(|r| r.channels < c.problem.key_dim()));
}

/// Errors that follow the tiles of a kernel are told by their period.
#[test]
fn failures_tell_where_elements_are_off() {
    let shape = [256, 2, 32];
    let want = vec![1.0; 256 * 2 * 32];
    let told = |wrong: &dyn Fn([usize; 3]) -> bool, value: f64| {
        let at = |i: usize| [i / 64, i / 32 % 2, i % 32];
        let got: Vec<f64> =
            (0..want.len()).map(|i| if wrong(at(i)) { value } else { 1.0 }).collect();
        relative_rms("x", &got, &want, &shape, 1e-3).unwrap_err()
    };
    let second_group = told(&|[t, _, c]| t % 128 >= 64 && c < 8, 2.0);
    let expected = "2048 of 16384 are far off (axis 0: 64-127 of every 128; axis 1: all; \
                    axis 2: 0-7)";
    assert!(second_group.ends_with(expected), "{second_group}");
    let warp = told(&|[t, h, _]| t % 64 == 17 && h == 1, f64::NAN);
    let expected = "NaN at [17, 1, 0] of [256, 2, 32], 1 expected; 128 of 16384 are far off \
                    (axis 0: 17 of every 64; axis 1: 1; axis 2: all)";
    assert!(warp.contains(expected), "{warp}");
    let few = told(&|[t, h, c]| [3, 5, 8, 100, 101, 200].contains(&t) && h == 0 && c == 0, 9.0);
    assert!(few.contains("(axis 0: 3, 5, 8, 100-101, ...; axis 1: 0; axis 2: 0)"), "{few}");

    // Axes by name, and rows of a long tensor one by one.
    let axes = Axes::tokens(&shape, Some(100));
    let mut got = want.clone();
    got[207 * 64 + 40] = 9.0;
    let told = relative_rms("o", &got, &want, axes, 1e-3).unwrap_err();
    let expected = "worst at token 207 (segment 2, row 7), head 1, channel 8 of [256, 2, 32]: 9 given, \
                    1 expected; 1 of 16384 are far off (token: 207; head: 1; channel: 8)";
    assert!(told.ends_with(expected), "{told}");
    got[207 * 64 + 40] = 1.4;
    assert!(relative_rms("o", &got, &want, axes, 1e-2).is_ok());
    let told = rows_are_close("o", &got, &want, axes, 1e-2).unwrap_err();
    assert!(told.ends_with("1 of 512 are far off (token: 207; head: 1)"), "{told}");
    assert_eq!(rows_are_close("o", &got, &want, axes, 1e-1), Ok(()));
    got[0] = f64::NAN;
    assert!(rows_are_close("o", &got, &want, axes, 1e-1).is_err());
}

#[test]
fn the_metric_fails_on_what_it_must() {
    let want = [1.0, -2.0, 3.0, 4.0];
    assert_eq!(relative_rms("x", &want, &want, &[2, 2], 0.0), Ok(0.0));
    let fails =
        |got: &[f64], want: &[f64]| relative_rms("x", got, want, &[2, 2], 1e-3).unwrap_err();
    assert!(fails(&[1.0, -2.0, 3.1, 4.0], &want).contains("[1, 0]"));
    assert!(fails(&[1.0, f64::NAN, 3.0, 4.0], &want).contains("[0, 1]"));
    assert!(fails(&want, &[1.0, f64::NAN, 3.0, 4.0]).contains("NaN"));
    assert!(fails(&[1.0, -2.0, 3.0, f64::INFINITY], &want).contains("inf"));
    assert!(fails(&[0.0, 0.0, 1e-30, 0.0], &[0.0; 4]).contains("inf"));
    let inf = [f64::NEG_INFINITY, 1.0, 2.0, 3.0];
    assert_eq!(relative_rms("x", &inf, &inf, &[4], 0.0), Ok(0.0));
    assert!(log_rms("x", &[1e-3, 0.0], &[0.0, 0.0], &[2], 1e-5).is_err());
    assert!(log_rms("x", &[1e-7, 0.0], &[0.0, 0.0], &[2], 1e-5).is_ok());
}

/// Shapes of kernels.
fn shapes() -> Vec<Shape> {
    let dims =
        [(32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (64, 128), (128, 64), (192, 128)];
    [DType::BF16, DType::F16].into_iter().flat_map(|t| dims.map(|(k, v)| (t, k, v))).collect()
}

#[test]
fn pairs_of_levels_meet_in_every_shape() {
    let budget = 150_000_000;
    let all = pairwise(&shapes(), budget);
    let names: std::collections::HashSet<&str> = all.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), all.len(), "names are unique");
    for (dtype, dk, dv) in shapes() {
        let of = |c: &&Case| {
            let p = &c.problem;
            (p.dtype(), p.key_dim(), p.value_dim()) == (dtype, dk, dv)
        };
        let count = all.iter().filter(of).count();
        assert!(count >= 3, "{dtype} {dk}x{dv}: {count} cases");
    }
    let has = |what: &str, f: &dyn Fn(&Case) -> bool| assert!(all.iter().any(f), "no case: {what}");
    for update in RULES {
        for batch in BATCHES {
            for denominator in DENOMINATORS {
                has("rule and batch", &|c| c.problem.update() == update && c.batch == batch);
                has("batch and denominator", &|c| {
                    c.batch == batch && c.problem.denominator() == denominator
                });
            }
            has("batch and flush", &|c| c.batch == batch && !c.flush_after.is_empty());
        }
        has("rotation", &|c| c.problem.update() == update && c.rope.is_some());
    }
    for n in SEGMENTS {
        for group in [1, 2, 4, 8] {
            has("N and group", &|c| {
                (c.problem.segment_len(), c.problem.group()) == (n, group) && c.tokens(0) > 0
            });
        }
    }
    let heavy: Vec<_> = all.iter().filter(|c| work(c) > 6 * budget).map(|c| &c.name).collect();
    assert!(heavy.is_empty(), "too much work: {heavy:?}");
    assert!(full(&shapes(), budget).len() > 5000);
}

/// The plain implementation as a backend.
struct PlainBackend;

impl Backend for PlainBackend {
    type State = Vec<Plain>;
    const PRECISION: Precision = Precision::TensorCore;
    const MARGIN: usize = 8;
    const PARALLEL: bool = true;

    fn refuses(&self, _: &Case) -> Option<&'static str> {
        None
    }

    fn new_state(&self, case: &Case, slots: usize) -> Vec<Plain> {
        vec![Plain::new(&case.problem); slots]
    }

    fn call<T: Element>(
        &self,
        p: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut Vec<Plain>,
        out: &mut OutputBuffers<T>,
    ) -> Result<()> {
        let lens: Vec<usize> = call.lens.iter().map(|&n| n as usize).collect();
        let shape = CallShape::new(call.batch, &lens);
        let padding = shape.lead.last().copied().unwrap_or(0);
        for (b, (&slot, &len)) in call.slots().iter().zip(&lens).enumerate() {
            let rows = |x: &Strided<T>, heads: usize| -> Vec<T> {
                let at = (0..len).flat_map(|t| (0..heads).map(move |h| (t, h)));
                at.flat_map(|(t, h)| x.row(&[&shape.token(b, t)[..], &[h]].concat()).to_vec())
                    .collect()
            };
            let stream = Stream {
                problem: *p,
                tokens: len,
                q: rows(&call.q, p.heads()),
                k: rows(&call.k, p.kv_heads()),
                v: rows(&call.v, p.kv_heads()),
            };
            let seen = state[slot].tokens as usize;
            let position = |t: usize| match call.rope.as_ref().and_then(|r| r.positions.as_ref()) {
                None => (seen + t) as i64,
                Some(list) => {
                    let at = *shape.token(b, t).last().expect("an index");
                    list[if list.len() == padding { at } else { b * padding + at }]
                }
            };
            let positions: Vec<i64> = (0..len).map(position).collect();
            let rope = call.rope.as_ref().map(|r| Rows {
                rotation: r.rotation,
                cos: r.cos,
                sin: r.sin,
                positions: &positions,
            });
            let got = state[slot].run(&stream, rope, gate);
            let width = p.value_dim();
            // Beyond the stream's end nothing is found: zeros, −∞.
            let padded = shape.padding(b, len).zip(len..).map(|(t, i)| (vec![b, t], i));
            let tokens = (0..len).map(|t| (shape.token(b, t), t)).chain(padded);
            for (token, t, h) in
                tokens.flat_map(|(at, t)| (0..p.heads()).map(move |h| (at.clone(), t, h)))
            {
                let i = t * p.heads() + h;
                let row = |all: &[f64]| -> Vec<T> {
                    let row = all.get(i * width..(i + 1) * width);
                    narrow(&row.map_or(vec![0.0; width], |r| r.iter().map(|&x| x as f32).collect()))
                };
                let at = [&token[..], &[h]].concat();
                out.o.set_row(&at, &row(&got.o));
                out.a_dot.iter_mut().for_each(|x| x.set_row(&at, &row(&got.a_dot)));
                out.a_mem.iter_mut().for_each(|x| x.set_row(&at, &row(&got.a_mem)));
                if let Some(lse) = &mut out.lse {
                    let at = match token[..] {
                        [b, t] => vec![b, h, t],
                        _ => vec![h, token[0]],
                    };
                    let value = got.lse.get(i).map_or(f32::NEG_INFINITY, |&x| x as f32);
                    lse.set(&at, scalar(value));
                }
            }
        }
        Ok(())
    }

    fn flush(&self, _: &Problem, state: &mut Vec<Plain>, slots: &[usize]) -> Result<()> {
        slots.iter().for_each(|&slot| state[slot].flush());
        Ok(())
    }

    fn memory(&self, _: &Problem, state: &Vec<Plain>, slot: usize) -> [Vec<f64>; 2] {
        [state[slot].m.clone(), state[slot].z.clone()]
    }

    fn counters(&self, state: &Vec<Plain>, slot: usize) -> [u64; 3] {
        let s = &state[slot];
        [s.tokens, s.committed, s.tokens - s.committed]
    }
}

#[test]
fn the_plain_implementation_meets_the_absolute_limits() {
    // Of two lengths, the shorter as in the simulator's table.
    let all = [20_000_000, 4_000_000].map(|budget| pairwise(&shapes(), budget)).concat();
    let summary = run_cases(&PlainBackend, &all).finish("plain");
    assert_eq!(summary.ran, all.len());
}
