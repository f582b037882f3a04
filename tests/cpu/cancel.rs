//! A call that is asked to end does so soon, and state and outputs are those of the tokens taken in.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::stream::Stream;
use infini_attn::{
    Error, Inputs, Outputs, Problem, Result, State, TensorView, TensorViewMut, Update, decode,
    prefill, reference,
};

const DIM: usize = 16;

fn problem(kv_heads: usize, segment_len: usize, update: Update) -> Problem {
    let builder = Problem::builder().heads(2).kv_heads(kv_heads).head_dim(DIM).update(update);
    builder.segment_len(segment_len).build().expect("valid")
}

/// A state with an open segment.
fn begun(p: &Problem) -> State {
    let mut state = State::new(p, 1).unwrap();
    let stream = Stream::normal(p, 2 * p.segment_len() + 5, 7);
    run(&stream, 0, &mut state, None).0.unwrap();
    state
}

/// Prefills a stream from token `from` on, and asks the call to end after a while.
fn run(
    stream: &Stream<f32>,
    from: usize,
    state: &mut State,
    after: Option<Duration>,
) -> (Result<()>, Vec<f32>) {
    let (p, rest) = (*state.problem(), stream.slice(from..stream.tokens));
    let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut out = vec![f32::NAN; rest.tokens * 2 * DIM];
    let result = std::thread::scope(|scope| {
        if let Some(after) = after {
            let (stop, done, begin) = (&stop, &done, Instant::now());
            scope.spawn(move || {
                while begin.elapsed() < after && !done.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                stop.store(true, Ordering::Relaxed);
            });
        }
        let view = TensorViewMut::new(&mut out, &[1, rest.tokens, 2, DIM]).unwrap();
        let inputs = if after.is_some() { rest.inputs().cancel(&stop) } else { rest.inputs() };
        let result = prefill(&p, &inputs, &[0.5; 2], state, Outputs::new(view));
        done.store(true, Ordering::Relaxed);
        result
    });
    (result, out)
}

/// A stream in pieces, each as long as what a call got done until it was told to end: the same bits
/// as in one call.
fn in_pieces(threads: usize, kv_heads: usize, update: Update, tokens: usize) {
    let p = problem(kv_heads, 64, update);
    let stream = Stream::<f32>::normal(&p, tokens, 3);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    pool.install(|| {
        let mut whole = begun(&p);
        let begin = Instant::now();
        let (result, want) = run(&stream, 0, &mut whole, None);
        result.unwrap();
        let each = begin.elapsed() / 4;
        // On a machine busy with other things a call may be faster than the one before it.
        for _ in 0..50 {
            let (mut from, mut got, mut cancelled, mut state) = (0, vec![], 0, begun(&p));
            for trial in 0.. {
                let before = state.tokens(0);
                let (result, out) = run(&stream, from, &mut state, Some(each * (trial % 8) / 2));
                let taken = match result {
                    Ok(()) => tokens - from,
                    Err(Error::Cancelled { taken }) => taken[0],
                    Err(other) => panic!("{other}"),
                };
                assert_eq!(state.tokens(0) - before, taken as u64);
                got.extend_from_slice(&out[..taken * 2 * DIM]);
                from += taken;
                if from == tokens {
                    break;
                }
                cancelled += usize::from(taken > 0);
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&got) == bits(&want), "outputs");
            assert!(state.to_bytes().unwrap() == whole.to_bytes().unwrap(), "state");
            if cancelled > 0 {
                return;
            }
        }
        panic!("no call ended on its way");
    });
}

/// One KV head on three threads: its segments run in parallel.
#[test]
fn segments_in_parallel() {
    in_pieces(3, 1, Update::Delta, 100_000);
    in_pieces(3, 1, Update::Linear, 100_000);
}

/// Two KV heads on two threads: each is walked through by one.
#[test]
fn heads_in_parallel() {
    in_pieces(2, 2, Update::Delta, 100_000);
    in_pieces(1, 2, Update::Linear, 100_000);
}

/// Nothing is taken in by a call that is cancelled before it begins, or inside of its first segment, be it
/// one that it completes or one that it only continues.
#[test]
fn as_before_the_call() {
    for (threads, kv_heads, update) in [
        (2, 2, Update::Delta),
        (3, 1, Update::Delta),
        (2, 2, Update::Linear),
        (3, 1, Update::Linear),
    ] {
        let p = problem(kv_heads, 30_000, update);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let stream = Stream::<f32>::normal(&p, 35_000, 3);
        pool.install(|| {
            let mut state = begun(&p);
            let before = state.to_bytes().unwrap();
            for (wait, tokens) in [(0, 35_000), (10, 29_000), (10, 35_000), (200, 29_000)] {
                let begin = Instant::now();
                let stream = stream.slice(0..tokens);
                let (result, _) = run(&stream, 0, &mut state, Some(Duration::from_millis(wait)));
                let text = result.unwrap_err().to_string();
                assert_eq!(text, "cancelled: [0] tokens per sequence were taken in");
                assert!(state.to_bytes().unwrap() == before);
                // Alone it takes tens of seconds; no bound of time, but one that tells them apart.
                assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
            }
            // And it goes on as though nothing had been asked of it.
            let (next, mut alone) = (stream.slice(0..9), begun(&p));
            let (got, want) = (run(&next, 0, &mut state, None), run(&next, 0, &mut alone, None));
            assert_eq!(got.1, want.1);
            assert!(state.to_bytes().unwrap() == alone.to_bytes().unwrap());
        });
    }
}

/// A decode of many sequences ends between them: those taken in have their outputs, the others are as
/// they were.
#[test]
fn a_decode_of_many_sequences() {
    let (slots, p) = (400, problem(1, 512, Update::Delta));
    let prompt = Stream::<f32>::normal(&p, 505, 1);
    let mut one = State::new(&p, 1).unwrap();
    run(&prompt, 0, &mut one, None).0.unwrap();
    // Some get their segment full in this call.
    let begun = one.fork(&vec![0; slots]).unwrap();
    for tokens in [4, 12] {
        let stream = Stream::<f32>::normal(&p, slots * tokens, 2);
        let view = |data, heads| TensorView::new(data, &[slots, tokens, heads, DIM]).unwrap();
        let inputs = Inputs::new(view(&stream.q, 2), view(&stream.k, 1), view(&stream.v, 1));
        let call = |state: &mut State, inputs: &Inputs<'_, f32>| {
            let mut out = vec![f32::NAN; slots * tokens * 2 * DIM];
            let o = TensorViewMut::new(&mut out, &[slots, tokens, 2, DIM]).unwrap();
            (decode(&p, inputs, &[0.5; 2], state, Outputs::new(o)), out)
        };
        let (mut whole, start) =
            (begun.fork(&(0..slots).collect::<Vec<_>>()).unwrap(), Instant::now());
        let (result, want) = call(&mut whole, &inputs);
        result.unwrap();
        let each = start.elapsed() / 8;
        let (mut midway, width) = (0, tokens * 2 * DIM);
        for trial in 0..200 {
            let (stop, mut state) =
                (AtomicBool::new(false), begun.fork(&(0..slots).collect::<Vec<_>>()).unwrap());
            let (result, out) = std::thread::scope(|scope| {
                let (stop, begin) = (&stop, Instant::now());
                scope.spawn(move || {
                    while begin.elapsed() < each * (trial % 9) {
                        std::thread::yield_now();
                    }
                    stop.store(true, Ordering::Relaxed);
                });
                call(&mut state, &inputs.cancel(stop))
            });
            let taken = match result {
                Ok(()) => vec![tokens; slots],
                Err(Error::Cancelled { taken }) => taken,
                Err(other) => panic!("{other}"),
            };
            let count = taken.iter().filter(|&&t| t == tokens).count();
            assert!(taken.iter().all(|&t| t == 0 || t == tokens));
            for (slot, &taken) in taken.iter().enumerate().filter(|(_, t)| **t > 0) {
                let rows = slot * width..(slot + 1) * width;
                assert!(
                    out[rows.clone()] == want[rows],
                    "outputs of sequence {slot}, {taken} taken in"
                );
            }
            let (done, left): (Vec<usize>, Vec<usize>) = (0..slots).partition(|&s| taken[s] > 0);
            let bytes =
                |state: &State, slots: &[usize]| state.fork(slots).unwrap().to_bytes().unwrap();
            assert!(bytes(&state, &done) == bytes(&whole, &done), "taken in");
            assert!(bytes(&state, &left) == bytes(&begun, &left), "not taken in");
            midway += usize::from(count > 0 && count < slots);
            if midway > 3 {
                break;
            }
        }
        assert!(midway > 0, "no call ended on its way");
    }
}

/// Sequences of a batch are cancelled one by one; `taken` is in their order, not in that of the work.
#[test]
fn every_sequence_says_its_own() {
    let p = problem(1, 8, Update::Delta);
    let (stop, lens) = (AtomicBool::new(true), [0i32, 3, 0, 5]);
    let x = vec![0.5f32; 8 * 2 * DIM];
    let q = TensorView::new(&x, &[8, 2, DIM]).unwrap();
    let kv = TensorView::new(&x[..8 * DIM], &[8, 1, DIM]).unwrap();
    let mut cu = vec![0];
    lens.iter().for_each(|len| cu.push(cu[cu.len() - 1] + len));
    let inputs = Inputs::new(q, kv, kv).cu_seqlens(&cu).slots(&[3, 1, 0, 2]);
    type Entry = for<'a, 'b, 'c, 'd, 'e> fn(
        &'a Problem,
        &'b Inputs<'c, f32>,
        &'d [f32],
        &'e mut State,
        Outputs<'c, f32>,
    ) -> Result<()>;
    for entry in [prefill::<f32> as Entry, decode::<f32> as Entry] {
        let mut state = State::new(&p, 4).unwrap();
        let mut out = vec![0.0f32; 8 * 2 * DIM];
        let view = TensorViewMut::new(&mut out, &[8, 2, DIM]).unwrap();
        let error = entry(&p, &inputs.cancel(&stop), &[0.0; 2], &mut state, Outputs::new(view));
        match error.unwrap_err() {
            Error::Cancelled { taken } => assert_eq!(taken, [0; 4]),
            other => panic!("{other}"),
        }
        assert_eq!(state.to_bytes().unwrap(), State::new(&p, 4).unwrap().to_bytes().unwrap());
    }
    let mut state = reference::State::new(&p, 4).unwrap();
    let error = reference::prefill(&p, &inputs.cancel(&stop), &[0.0; 2], &mut state).unwrap_err();
    assert!(matches!(error, Error::Cancelled { taken } if taken == [0; 4]));
}
