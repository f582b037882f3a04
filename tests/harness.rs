//! What the other tests rest on: the table covers its axes, the metric fails when it must.

mod common;

use common::cases::{Batch, Case, DENOMINATORS, DIMS, DTYPES, EMPTY, RULES, SEGMENTS, cases};
use common::metric::{log_rms, relative_rms};

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
        for batch in [Batch::Full, Batch::Padded, Batch::Packed] {
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
