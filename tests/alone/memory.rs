//! Memory beyond inputs, outputs and state does not depend on the number of tokens. Every
//! allocation of the process is watched.

use infini_attn::{
    Inputs, Outputs, Problem, State, TensorView, TensorViewMut, Update, decode, prefill,
};
use peak_alloc::PeakAlloc;

use crate::allocations::Counting;
use crate::alone;

#[global_allocator]
static ALLOCATOR: Counting = Counting(PeakAlloc);

pub(crate) const ALLOCATED: &PeakAlloc = &ALLOCATOR.0;

/// Bytes a prefill of `tokens` tokens allocates at its worst, beyond what it is given.
fn peak(problem: &Problem, tokens: usize) -> usize {
    let data = vec![0.25f32; tokens * 64];
    let mut out = vec![0.0f32; tokens * 64];
    let mut state = State::new(problem, 1).unwrap();
    let shape = [1, tokens, 1, 64];
    let view = TensorView::new(&data, &shape).expect("shape");
    let o = TensorViewMut::new(&mut out, &shape).expect("shape");
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    prefill(problem, &Inputs::new(view, view, view), &[0.0], &mut state, Outputs::new(o))
        .expect("valid");
    assert!(out.iter().all(|x| (x - 0.25).abs() < 0.25));
    ALLOCATED.peak_usage() - before
}

#[test]
fn workspace_does_not_grow_with_the_stream() {
    let _alone = alone();
    // The global pool belongs to the other test.
    let pool = rayon::ThreadPoolBuilder::new().build().expect("a pool");
    pool.install(measure);
}

fn measure() {
    for update in [Update::Linear, Update::Delta] {
        let problem = Problem::builder().segment_len(64).update(update).build().expect("valid");
        // The longest workspace of a run is in use from here on.
        let (once, twice) = (peak(&problem, 1 << 18), peak(&problem, 1 << 19));
        println!("{update}: {once} bytes for 2^18 tokens, {twice} for 2^19");
        assert!(twice <= once + once / 20, "{update}: {once} bytes, then {twice}");
        assert!(twice < 64 << 20, "{update}: {twice} bytes");
    }
}

/// Tokens decoded by copies of which each takes the place of the last: the rows go where they would in
/// place, and nothing is copied but when a segment fills.
#[test]
fn decoding_copies_copies_nothing() {
    let _alone = alone();
    let p = Problem::builder().segment_len(1 << 13).build().expect("valid");
    let (x, shape) = (vec![0.25f32; 100 * 64], |tokens| [1, tokens, 1, 64]);
    let mut out = vec![0.0f32; 100 * 64];
    let mut run = |state: &mut State, tokens: usize| {
        let view = TensorView::new(&x[..tokens * 64], &shape(tokens)).expect("shape");
        let o = TensorViewMut::new(&mut out[..tokens * 64], &shape(tokens)).expect("shape");
        let entry = if tokens > 1 { prefill::<f32> } else { decode::<f32> };
        entry(&p, &Inputs::new(view, view, view), &[0.0], state, Outputs::new(o)).expect("valid");
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool");
    pool.install(|| {
        let mut first = State::new(&p, 1).unwrap();
        run(&mut first, 100);
        // Every way to a state with an open segment notes how far that goes.
        let prompt = first.clone();
        let loaded = State::from_bytes(&first.to_bytes().unwrap()).unwrap();
        let joined = State::concat(&[&first]).unwrap();
        let forked = first.fork(&[0]).unwrap();
        drop(first);
        for (name, mut state) in
            [("prompt", prompt), ("loaded", loaded), ("joined", joined), ("forked", forked)]
        {
            // The first appends in place, where nobody else holds the rows.
            for tokens in [1, 1, 100, 1, 1, 1] {
                let before = ALLOCATED.current_usage();
                ALLOCATED.reset_peak_usage();
                let mut next = state.clone();
                run(&mut next, tokens);
                let taken = ALLOCATED.peak_usage() - before;
                assert!(tokens > 1 || taken < 1 << 20, "{name}: {taken} B of {}", next.bytes());
                state = next;
            }
        }
    });
}
