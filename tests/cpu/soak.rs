//! A stream so long that rounding adds up: M, z and what is read from them against float64 recurrences,
//! and the bytes of the state, which do not grow. The long form, 10 million tokens (docs/cpu.md):
//! `cargo test --release --test cpu soak -- --ignored --nocapture`.

use infini_attn::{DType, Problem, State, Update};

use crate::common::metric::relative_rms;
use crate::common::model::{Entry, run_entry, run_in_chunks, slot_values};
use crate::common::stream::Stream;
use crate::common::tolerance::{STATE_TOLERANCE, output_tolerance};

/// M and z of one head in float64.
struct Exact {
    dim: usize,
    update: Update,
    m: Vec<f64>,
    z: Vec<f64>,
}

fn sigma(row: &[f32]) -> Vec<f64> {
    row.iter().map(|&x| f64::from(x)).map(|x| if x > 0.0 { x + 1.0 } else { x.exp() }).collect()
}

impl Exact {
    fn new(p: &Problem) -> Self {
        let dim = p.key_dim();
        Self { dim, update: p.update(), m: vec![0.0; dim * dim], z: vec![0.0; dim] }
    }

    /// σ(x) M / σ(x)·z for a row that is mapped already.
    fn retrieve(&self, x: &[f64]) -> Vec<f64> {
        let sum: f64 = x.iter().zip(&self.z).map(|(x, z)| x * z).sum();
        let mut row = vec![0.0; self.dim];
        for (x, m) in x.iter().zip(self.m.chunks_exact(self.dim)) {
            row.iter_mut().zip(m).for_each(|(row, m)| *row += x / sum * m);
        }
        row
    }

    /// Writes a segment, eq. (8) or (9).
    fn commit(&mut self, k: &[f32], v: &[f32]) {
        let empty = self.z.iter().all(|&z| z == 0.0);
        let rows = k.chunks_exact(self.dim).zip(v.chunks_exact(self.dim)).map(|(k, v)| {
            let (k, mut v) = (sigma(k), v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
            if self.update == Update::Delta && !empty {
                v.iter_mut().zip(self.retrieve(&k)).for_each(|(v, found)| *v -= found);
            }
            (k, v)
        });
        for (k, v) in rows.collect::<Vec<_>>() {
            self.z.iter_mut().zip(&k).for_each(|(z, k)| *z += k);
            for (k, m) in k.iter().zip(self.m.chunks_exact_mut(self.dim)) {
                m.iter_mut().zip(&v).for_each(|(m, v)| *m += k * v);
            }
        }
    }
}

/// What the system has given to the process, in MiB; 0 where it does not say.
fn resident_mib() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok());
    (pages.unwrap_or(0) * 4096) >> 20
}

/// Relative RMS errors of M, z and what some queries retrieve.
fn errors(state: &State, exact: &Exact, seed: u64) -> Result<[f64; 3], String> {
    let p = state.problem();
    let queries = Stream::<f32>::normal(p, 32, seed);
    // A copy goes on: the state stays as it is.
    let read = run_entry(Entry::Prefill, 32, &queries.inputs(), &[0.0], &mut state.clone()).a_mem;
    let want: Vec<f64> =
        queries.q.chunks_exact(exact.dim).flat_map(|q| exact.retrieve(&sigma(q))).collect();
    let close = |what: &str, got: &[f64], want: &[f64], tolerance| {
        relative_rms(what, got, want, &[want.len()], tolerance)
    };
    Ok([
        close("M", &slot_values(&state.memory(), 0), &exact.m, STATE_TOLERANCE)?,
        close("z", &slot_values(&state.normalizer(), 0), &exact.z, STATE_TOLERANCE)?,
        close("retrieved", &read, &want, output_tolerance(DType::F32))?,
    ])
}

/// At least `tokens` tokens through one sequence, three quarters of them by prefills of 16 segments, the
/// others by decodes of 16 tokens.
fn soak(update: Update, segment_len: usize, dim: usize, tokens: usize, checkpoints: usize) {
    let builder = Problem::builder().head_dim(dim).segment_len(segment_len).update(update);
    let p = builder.build().expect("valid");
    let (mut state, mut exact) = (State::new(&p, 1).expect("room"), Exact::new(&p));
    let (bytes, calls) = (state.bytes(), tokens.div_ceil(16 * segment_len));
    for call in 1..=calls {
        let stream = Stream::<f32>::normal(&p, 16 * segment_len, call as u64);
        let (entry, chunk) = match call % 4 {
            0 => (Entry::Decode, 16),
            _ => (Entry::Prefill, stream.tokens),
        };
        run_in_chunks(entry, chunk, &stream, &[0.0], &mut state);
        let rows = segment_len * dim;
        let segments = stream.k.chunks_exact(rows).zip(stream.v.chunks_exact(rows));
        segments.for_each(|(k, v)| exact.commit(k, v));
        if call * checkpoints / calls > (call - 1) * checkpoints / calls {
            let at = state.committed(0);
            let errors = errors(&state, &exact, call as u64).unwrap_or_else(|e| {
                panic!("{update}, N = {segment_len}, d = {dim}, {at} tokens: {e}")
            });
            let [m, z, read] = errors;
            println!(
                "{update} | {segment_len}, {dim} | {at} | {m:.1e} | {z:.1e} | {read:.1e} | {} MiB",
                resident_mib()
            );
            assert_eq!(state.bytes(), bytes);
        }
    }
}

#[test]
fn a_long_stream_stays_exact() {
    for update in [Update::Linear, Update::Delta] {
        soak(update, 64, 16, 200_000, 2);
    }
}

#[test]
#[ignore = "minutes"]
fn ten_million_tokens_of_short_segments() {
    for update in [Update::Linear, Update::Delta] {
        soak(update, 64, 16, 10_000_000, 10);
    }
}

#[test]
#[ignore = "minutes"]
fn ten_million_tokens_of_long_segments() {
    for update in [Update::Linear, Update::Delta] {
        soak(update, 2048, 64, 10_000_000, 10);
    }
}
