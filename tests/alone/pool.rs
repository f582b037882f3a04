//! The caller's rayon pool is honoured. Nothing in this process may have started the global
//! one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::alone;
use crate::common::model::{Entry, run_entry};
use crate::common::stream::Stream;
use infini_attn::{Problem, State, Update, flush};

#[test]
fn work_stays_in_the_callers_pool() {
    let _alone = alone();
    let started = Arc::new(AtomicUsize::new(0));
    let counter = started.clone();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .start_handler(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
        })
        .build()
        .expect("a pool");
    pool.install(|| {
        assert_eq!(rayon::current_num_threads(), 1);
        for update in [Update::Linear, Update::Delta] {
            // Products large enough for a library to be tempted into threads of its own.
            let problem = Problem::builder()
                .heads(4)
                .kv_heads(2)
                .head_dim(128)
                .segment_len(256)
                .update(update)
                .build()
                .expect("valid");
            let stream = Stream::<f32>::normal(&problem, 1100, 1);
            let mut state = State::new(&problem, 1).unwrap();
            let mut run = |entry, from: usize, to: usize| {
                let part = stream.slice(from..to);
                run_entry(entry, part.tokens, &part.inputs(), &[0.0; 4], &mut state);
            };
            run(Entry::Prefill, 0, 1090);
            run(Entry::Decode, 1090, 1100);
            flush(&problem, &mut state, &[0]).expect("slot 0");
        }
    });
    assert_eq!(started.load(Ordering::SeqCst), 1);
    // The global pool can still be configured, so nothing has started it.
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build_global()
        .expect("the global pool must not have been used");
}

/// Says in a child that there are no threads to be had.
#[cfg(target_os = "linux")]
const STARVED: &str = "INFINI_ATTN_TEST_THREADS";

/// A container's limit, say: every operation that needs threads refuses, and changes nothing.
#[cfg(target_os = "linux")]
#[test]
fn threads_that_cannot_be_started_are_an_error() {
    let _alone = alone();
    let program = std::env::current_exe().expect("this program");
    let child = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 1048576 && exec \"$0\" \"$@\""])
        .arg(&program)
        .args(["--exact", "pool::meets_a_limit", "--nocapture"])
        .envs([(STARVED, "1"), ("RAYON_NUM_THREADS", "2000"), ("MALLOC_ARENA_MAX", "1")])
        // Stacks so large that some are refused while there is memory for all else.
        .env("RUST_MIN_STACK", (180 << 20).to_string())
        .output()
        .expect("sh");
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
}

/// Alone it does nothing: it is what the child runs.
#[cfg(target_os = "linux")]
#[test]
fn meets_a_limit() {
    use infini_attn::{
        KeySums, MAX_DECODE_TOKENS, Outputs, TensorView, TensorViewMut, apply, compose,
    };
    if std::env::var(STARVED).is_err() {
        return;
    }
    let builder = Problem::builder().heads(2).head_dim(64).segment_len(64).update(Update::Linear);
    let p = builder.build().expect("valid");
    let stream = Stream::<f32>::normal(&p, 200, 1);
    let mut state = State::new(&p, 1).unwrap();
    let before = state.to_bytes().unwrap();
    let view = |data, shape: &[usize]| TensorView::new(data, shape).unwrap();
    let kv = view(&stream.k, &[1, 200, 2, 64]);
    let lse = vec![0.0; 400];
    let lse = view(&lse, &[1, 2, 200]);
    let (mut first, mut second) = (vec![0.0; stream.q.len()], vec![0.0; stream.q.len()]);
    let [o, merged] =
        [&mut first, &mut second].map(|out| TensorViewMut::new(out, &[1, 200, 2, 64]).unwrap());
    let zero = KeySums::zero(&p, 1).unwrap();
    // A pool of the caller's own is no matter of the global one.
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let map =
        |before: &KeySums| one.install(|| infini_attn::segment_map(&p, kv, kv, before)).unwrap();
    let sums = one.install(|| infini_attn::key_sums(&p, kv)).unwrap();
    let (map, after) = (map(&zero), map(&sums));
    let refused = [
        infini_attn::prefill(&p, &stream.inputs(), &[0.0; 2], &mut state, Outputs::new(o)),
        flush(&p, &mut state, &[0]),
        infini_attn::key_sums(&p, kv).map(drop),
        infini_attn::segment_map(&p, kv, kv, &zero).map(drop),
        compose(&map, &after).map(drop),
        apply(&map, &mut state),
        infini_attn::merge_memories(&[&state]).map(drop),
        infini_attn::merge_partials(&[kv, kv], &[lse, lse], merged, None),
    ];
    for (i, result) in refused.into_iter().enumerate() {
        let error = result.expect_err("there are no threads").to_string();
        assert!(
            error.starts_with("threads: ") && error.contains("RAYON_NUM_THREADS"),
            "{i}: {error}"
        );
    }
    assert!(state.to_bytes().unwrap() == before);
    assert!(state.decodes_inline(1) && !state.decodes_inline(MAX_DECODE_TOKENS + 1));
    run_entry(Entry::Decode, 1, &stream.slice(0..1).inputs(), &[0.0; 2], &mut state);
}
