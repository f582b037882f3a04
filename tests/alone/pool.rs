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
