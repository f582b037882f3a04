//! One regression test for each mistake seen in public implementations of Infini-attention.

use crate::common::metric::assert_close;
use crate::common::model::{Entry, Fast, Model, Output, run_entry};
use crate::common::stream::{Stream, rope_tables};
use crate::common::widen;
use half::{bf16, f16};
use infini_attn::{
    DType, Element, Error, Inputs, Outputs, Problem, ProblemBuilder, Rope, State, TensorView,
    TensorViewMut, Update, flush, prefill,
};

const ENTRIES: [Entry; 2] = [Entry::Prefill, Entry::Decode];

/// 4 query heads on 2 KV heads, (Dk, Dv) = (8, 6), N = 8, delta, f32.
fn problem(change: impl FnOnce(ProblemBuilder) -> ProblemBuilder) -> Problem {
    let base = Problem::builder().heads(4).kv_heads(2).key_dim(8).value_dim(6).segment_len(8);
    change(base).build().expect("valid")
}

const GATE: [f32; 4] = [-1.0, 0.0, 0.5, 2.0];

/// The whole stream through one entry: in one call by prefill, token by token by decode.
/// Concatenated o, a_dot and a_mem; lse is left out.
fn run<T: Element>(entry: Entry, stream: &Stream<T>, state: &mut State) -> Output {
    let step = if entry == Entry::Prefill { stream.tokens.max(1) } else { 1 };
    let mut all = Output { o: vec![], a_dot: vec![], a_mem: vec![], lse: vec![] };
    for start in (0..stream.tokens).step_by(step) {
        let part = stream.slice(start..(start + step).min(stream.tokens));
        let out = run_entry(entry, part.tokens, &part.inputs(), &GATE, state);
        all.o.extend(out.o);
        all.a_dot.extend(out.a_dot);
        all.a_mem.extend(out.a_mem);
    }
    all
}

fn memory(state: &State) -> [Vec<f64>; 2] {
    let model = Fast(state.clone());
    [model.memory(), model.normalizer()]
}

#[test]
fn wrong_gqa_map() {
    // Every value of KV head g is g + 1: head h must read KV head h / 2, here and in the memory.
    let p = problem(|b| b.update(Update::Linear));
    let mut stream = Stream::<f32>::normal(&p, 24, 1);
    (0..24).for_each(|t| (0..2).for_each(|g| stream.row_mut('v', t, g).fill(g as f32 + 1.0)));
    for entry in ENTRIES {
        let out = run(entry, &stream, &mut State::new(&p, 1).unwrap());
        for (i, (&dot, &mem)) in out.a_dot.iter().zip(&out.a_mem).enumerate() {
            let (token, head) = (i / 24, i / 6 % 4);
            let want = [1.0, 1.0, 2.0, 2.0][head];
            assert!((dot - want).abs() < 1e-6, "{entry:?}: a_dot of head {head}: {dot}");
            let want = if token < 8 { 0.0 } else { want };
            assert!((mem - want).abs() < 1e-5, "{entry:?}: a_mem of head {head}: {mem}");
        }
    }
}

#[test]
fn heads_split_by_a_view_without_a_transpose() {
    // The same numbers stored [B, H, T, D] and seen as [B, T, H, D] through strides.
    let p = problem(|b| b);
    let (tokens, stream) = (19, Stream::<f32>::normal(&p, 19, 2));
    let swap = |data: &[f32], heads: usize, dim: usize| -> Vec<f32> {
        let row = |h: usize, t: usize| &data[(t * heads + h) * dim..][..dim];
        (0..heads).flat_map(|h| (0..tokens).flat_map(move |t| row(h, t)).copied()).collect()
    };
    let (q, k, v) = (swap(&stream.q, 4, 8), swap(&stream.k, 2, 8), swap(&stream.v, 2, 6));
    fn view(data: &[f32], heads: usize, dim: usize) -> TensorView<'_, f32> {
        let tokens = data.len() / heads / dim;
        let strides = [data.len(), dim, tokens * dim, 1].map(|s| s as i64);
        TensorView::strided(data, 0, &[1, tokens, heads, dim], &strides).expect("inside")
    }
    let inputs = Inputs::new(view(&q, 4, 8), view(&k, 2, 8), view(&v, 2, 6));
    let mut states =
        [State::new(&p, 1).unwrap(), State::new(&p, 1).unwrap(), State::new(&p, 1).unwrap()];
    let got = run_entry(Entry::Prefill, tokens, &inputs, &GATE, &mut states[0]);
    let want = run_entry(Entry::Prefill, tokens, &stream.inputs(), &GATE, &mut states[1]);
    assert_eq!(got, want);
    assert_eq!(memory(&states[0]), memory(&states[1]));
    // The mistake itself, for contrast: the same buffer relabelled gives another result.
    let relabelled = Stream { problem: p, tokens, q, k, v };
    let wrong = run_entry(Entry::Prefill, tokens, &relabelled.inputs(), &GATE, &mut states[2]);
    assert_ne!(wrong.o, want.o);
}

#[test]
fn delta_corrected_with_the_queries_retrieval() {
    // What is written must not depend on q at all.
    let p = problem(|b| b.update(Update::Delta));
    let stream = Stream::<f32>::normal(&p, 30, 3);
    let mut other = stream.clone();
    other.q.iter_mut().for_each(|q| *q = 1.0 - 2.0 * *q);
    for entry in ENTRIES {
        let (mut a, mut b) = (State::new(&p, 1).unwrap(), State::new(&p, 1).unwrap());
        let (x, y) = (run(entry, &stream, &mut a), run(entry, &other, &mut b));
        assert_ne!(x.a_mem, y.a_mem);
        assert_eq!(memory(&a), memory(&b), "{entry:?}");
    }
}

#[test]
fn recommitting_overlapping_windows_while_decoding() {
    // k = 0, so that σ(k) = 1 and z counts the tokens written, v = 1, so that M does too.
    let p = problem(|b| b.update(Update::Linear));
    let mut stream = Stream::<f32>::normal(&p, 45, 4);
    stream.k.fill(0.0);
    stream.v.fill(1.0);
    for step in [1, 3, 16] {
        let mut state = State::new(&p, 1).unwrap();
        for start in (0..45).step_by(step) {
            let end = (start + step).min(45);
            let part = stream.slice(start..end);
            run_entry(Entry::Decode, part.tokens, &part.inputs(), &GATE, &mut state);
            let committed = end / 8 * 8;
            assert_eq!((state.tokens(0), state.committed(0)), (end as u64, committed as u64));
            assert_eq!(state.open_len(0), end % 8);
            let [m, z] = memory(&state);
            assert!(m.iter().chain(&z).all(|&x| x == committed as f64), "after token {end}");
        }
    }
}

#[test]
fn one_memory_handed_through_the_layer_stack() {
    // Two layers take turns; each must end where it ends alone.
    let p = problem(|b| b);
    let layers = [Stream::<f32>::normal(&p, 20, 5), Stream::<f32>::normal(&p, 20, 6)];
    let mut turns = [State::new(&p, 1).unwrap(), State::new(&p, 1).unwrap()];
    let mut outputs = [vec![], vec![]];
    for t in 0..20 {
        for (layer, stream) in layers.iter().enumerate() {
            let part = stream.slice(t..t + 1);
            let out = run(Entry::Decode, &part, &mut turns[layer]);
            outputs[layer].extend(out.o);
        }
    }
    for (layer, stream) in layers.iter().enumerate() {
        let mut alone = State::new(&p, 1).unwrap();
        assert_eq!(run(Entry::Decode, stream, &mut alone).o, outputs[layer]);
        assert_eq!(memory(&alone), memory(&turns[layer]));
    }
}

#[test]
fn one_memory_shared_by_batch_rows() {
    // Row 1 of a batch changes; row 0 must not notice.
    let p = problem(|b| b);
    let first = Stream::<f32>::normal(&p, 20, 7);
    let run = |seed: u64| {
        let mut both = first.clone();
        both.append(&Stream::normal(&p, 20, seed));
        let view = |data, heads, dim| TensorView::new(data, &[2, 20, heads, dim]).expect("shape");
        let inputs = Inputs::new(view(&both.q[..], 4, 8), view(&both.k, 2, 8), view(&both.v, 2, 6));
        let (mut state, mut o) = (State::new(&p, 2).unwrap(), vec![0.0; 2 * 20 * 24]);
        let out = Outputs::new(TensorViewMut::new(&mut o, &[2, 20, 4, 6]).expect("shape"));
        prefill(&p, &inputs, &GATE, &mut state, out).expect("valid");
        (o, memory(&state), memory(&state.fork(&[1]).expect("slot 1")))
    };
    let ((a, first_a, second_a), (b, first_b, second_b)) = (run(8), run(9));
    assert_eq!(a[..480], b[..480]);
    assert_eq!(first_a, first_b);
    assert_ne!(a[480..], b[480..]);
    assert_ne!(second_a, second_b);
}

#[test]
fn decode_that_drops_retrieval_and_gate() {
    let p = problem(|b| b);
    let stream = Stream::<f32>::normal(&p, 29, 10);
    let (mut by_prefill, mut by_decode) = (State::new(&p, 1).unwrap(), State::new(&p, 1).unwrap());
    let want = run(Entry::Prefill, &stream, &mut by_prefill);
    let got = run(Entry::Decode, &stream, &mut by_decode);
    assert!(got.a_mem[8 * 24..].iter().all(|&x| x != 0.0), "retrieval is missing");
    for (what, got, want) in [
        ("o", &got.o, &want.o),
        ("a_mem", &got.a_mem, &want.a_mem),
        ("a_dot", &got.a_dot, &want.a_dot),
    ] {
        assert_close(what, got, want, 1e-5);
    }
    for (i, &o) in got.o.iter().enumerate() {
        let g = 1.0 / (1.0 + f64::exp(-f64::from(GATE[i / 6 % 4])));
        let mixed = g * got.a_mem[i] + (1.0 - g) * got.a_dot[i];
        assert!((o - mixed).abs() < 1e-6, "element {i}: {o}, {mixed} expected");
    }
}

#[test]
fn rotated_keys_in_the_memory() {
    // Rotation on and off: the same M, z and retrieval, also through the open segment and a flush.
    let p = problem(|b| b);
    let stream = Stream::<f32>::normal(&p, 29, 11);
    let (cos, sin) = rope_tables(32, 8, 1.3);
    let table = |data| TensorView::new(data, &[32, 4]).expect("a table");
    for (entry, chunk) in [(Entry::Prefill, 29), (Entry::Prefill, 5), (Entry::Decode, 3)] {
        let run = |rotate: bool| {
            let (mut state, mut a_mem, mut a_dot) = (State::new(&p, 1).unwrap(), vec![], vec![]);
            for start in (0..29).step_by(chunk) {
                let part = stream.slice(start..(start + chunk).min(29));
                let mut inputs = part.inputs();
                if rotate {
                    inputs = inputs.rope(Rope::new(table(&cos), table(&sin)));
                }
                let out = run_entry(entry, part.tokens, &inputs, &GATE, &mut state);
                a_mem.extend(out.a_mem);
                a_dot.extend(out.a_dot);
            }
            flush(&p, &mut state, &[0]).expect("slot 0");
            (a_mem, memory(&state), a_dot)
        };
        let (plain, rotated) = (run(false), run(true));
        assert_ne!(plain.2, rotated.2, "the local branch must rotate");
        assert_eq!((plain.0, plain.1), (rotated.0, rotated.1), "{entry:?} by {chunk}");
    }
}

#[test]
fn zero_padded_last_segment() {
    // σ(0) = 1: with k = 0 the normaliser counts tokens, and would count padding.
    let p = problem(|b| b);
    let mut stream = Stream::<f32>::normal(&p, 11, 12);
    stream.k.fill(0.0);
    for entry in ENTRIES {
        let mut state = State::new(&p, 1).unwrap();
        run(entry, &stream, &mut state);
        flush(&p, &mut state, &[0]).expect("slot 0");
        assert_eq!((state.committed(0), state.open_len(0)), (11, 0));
        assert!(memory(&state)[1].iter().all(|&z| z == 11.0), "{entry:?}");
        // The next token opens a segment of full length.
        run(entry, &stream.slice(0..8), &mut state);
        assert_eq!((state.committed(0), state.open_len(0)), (19, 0));
        assert!(memory(&state)[1].iter().all(|&z| z == 19.0), "{entry:?}");
    }
}

#[test]
fn sixteen_bit_memory_overflows_or_stops() {
    // 2^20 + 2^16 tokens: f16 overflows at 65,504, and a bf16 sum of segments stops at 256 segments,
    // here 2^14 tokens. M = z = the count, retrieval exactly 1.
    fn long<T: Element>() {
        let p = Problem::builder()
            .head_dim(2)
            .segment_len(64)
            .update(Update::Linear)
            .dtype(T::DTYPE)
            .build()
            .expect("valid");
        let stream = Stream::<T>::from_fn(&p, 1 << 16, 13, |c, x| match c {
            'q' => x,
            'k' => 0.0,
            _ => 1.0,
        });
        let mut model = Fast::new(&p);
        for i in 1..=17u32 {
            let out = model.run(&stream, &[f32::INFINITY]);
            assert!(out.a_mem[128..].iter().all(|&x| x == 1.0), "{} {i}", T::DTYPE);
            let count = f64::from(i << 16);
            assert!(model.normalizer().iter().all(|&z| z == count), "{} {i}", T::DTYPE);
            assert!(model.memory().iter().all(|&m| m == count), "{} {i}", T::DTYPE);
        }
    }
    long::<f16>();
    long::<bf16>();
}

#[test]
fn gate_inverted() {
    let p = problem(|b| b);
    let stream = Stream::<f32>::normal(&p, 12, 14);
    for entry in ENTRIES {
        let run = |beta: f32| {
            let mut state = State::new(&p, 1).unwrap();
            run_entry(Entry::Prefill, 8, &stream.slice(0..8).inputs(), &[beta; 4], &mut state);
            run_entry(entry, 4, &stream.slice(8..12).inputs(), &[beta; 4], &mut state)
        };
        let (closed, open) = (run(f32::NEG_INFINITY), run(f32::INFINITY));
        assert_eq!(closed.o, closed.a_dot, "β = −∞ is the local branch");
        assert_eq!(open.o, open.a_mem, "β = +∞ is the memory");
        let mixed = run(1.0);
        let g = 1.0 / (1.0 + f64::exp(-1.0));
        let want: Vec<f64> =
            mixed.a_mem.iter().zip(&mixed.a_dot).map(|(m, d)| g * m + (1.0 - g) * d).collect();
        assert_close("β = 1", &mixed.o, &want, 1e-5);
    }
}

#[test]
fn z_summed_over_the_wrong_axis() {
    // N = Dk, so that a sum over channels would have the right shape.
    let p = problem(|b| b.segment_len(8).key_dim(8));
    let stream = Stream::<f32>::normal(&p, 8, 15);
    let k = widen(&stream.k);
    let sigma = |x: f64| if x > 0.0 { x + 1.0 } else { x.exp() };
    // [tokens, Hkv, Dk] summed over tokens.
    let want: Vec<f64> = (0..16).map(|i| (0..8).map(|t| sigma(k[t * 16 + i])).sum()).collect();
    for entry in ENTRIES {
        let mut state = State::new(&p, 1).unwrap();
        run(entry, &stream, &mut state);
        assert_close("z", &memory(&state)[1], &want, 1e-5);
    }
}

#[test]
fn state_not_carried_between_calls() {
    let p = problem(|b| b);
    let stream = Stream::<f32>::normal(&p, 40, 16);
    let whole = run(Entry::Prefill, &stream, &mut State::new(&p, 1).unwrap());
    for first in [1, 7, 8, 9, 20, 39] {
        for entry in ENTRIES {
            let mut state = State::new(&p, 1).unwrap();
            let mut got = run(Entry::Prefill, &stream.slice(0..first), &mut state).o;
            got.extend(run(entry, &stream.slice(first..40), &mut state).o);
            assert_close(&format!("{first} + {entry:?}"), &got, &whole.o, 1e-5);
        }
    }
}

/// The CPU has no streams; what can go wrong alike is work of one caller landing in another's.
/// That a caller's pool is honoured is tested in `pool.rs`.
#[test]
fn launch_on_the_wrong_stream() {
    let p = problem(|b| b.segment_len(16));
    let streams: Vec<_> = (0..4).map(|i| Stream::<f32>::normal(&p, 200, 100 + i)).collect();
    let alone: Vec<_> =
        streams.iter().map(|s| run(Entry::Prefill, s, &mut State::new(&p, 1).unwrap())).collect();
    std::thread::scope(|scope| {
        for (stream, want) in streams.iter().zip(&alone) {
            let p = &p;
            scope.spawn(move || {
                for _ in 0..5 {
                    let got = run(Entry::Prefill, stream, &mut State::new(p, 1).unwrap());
                    assert_eq!(got, *want, "concurrent callers must not mix");
                }
            });
        }
    });
}

#[test]
fn non_contiguous_input_silently_misread() {
    // The last dimension must be contiguous: anything else is refused by name, not misread. The
    // other strides are free, which the table's arrangements test.
    let p = problem(|b| b);
    let stream = Stream::<f32>::normal(&p, 4, 17);
    let twice = |data: &[f32]| data.iter().flat_map(|&x| [x, f32::NAN]).collect::<Vec<_>>();
    let (q, k, v) = (twice(&stream.q), twice(&stream.k), twice(&stream.v));
    fn view(data: &[f32], heads: usize, dim: usize) -> TensorView<'_, f32> {
        let strides = [8 * heads * dim, 2 * heads * dim, 2 * dim, 2].map(|s| s as i64);
        TensorView::strided(data, 0, &[1, 4, heads, dim], &strides).expect("inside")
    }
    let plain = stream.inputs();
    for (name, inputs) in [
        ("q", Inputs::new(view(&q, 4, 8), plain.k, plain.v)),
        ("k", Inputs::new(plain.q, view(&k, 2, 8), plain.v)),
        ("v", Inputs::new(plain.q, plain.k, view(&v, 2, 6))),
    ] {
        let (mut state, mut o) = (State::new(&p, 1).unwrap(), vec![0.0; 96]);
        let out = Outputs::new(TensorViewMut::new(&mut o, &[1, 4, 4, 6]).expect("shape"));
        let error = prefill(&p, &inputs, &GATE, &mut state, out).expect_err("must be refused");
        assert!(matches!(error, Error::Stride { argument, .. } if argument == name), "{error}");
        assert_eq!(state.tokens(0), 0);
    }
}

#[test]
fn thirty_two_bit_index_overflow() {
    // Tokens 2^30 + 7 elements apart, the third beyond 2^31. The pages between are never touched,
    // so they cost address space only.
    let p = problem(|b| b.dtype(DType::BF16));
    let (tokens, stride) = (3usize, (1usize << 30) + 7);
    let stream = Stream::<bf16>::normal(&p, tokens, 18);
    let spread = |data: &[bf16], width: usize| {
        let mut far = vec![0u16; (tokens - 1) * stride + width];
        for (t, row) in data.chunks_exact(width).enumerate() {
            far[t * stride..][..width].copy_from_slice(bytemuck::cast_slice(row));
        }
        far
    };
    let (q, k, v) = (spread(&stream.q, 32), spread(&stream.k, 16), spread(&stream.v, 12));
    let strides = |dim: usize| [0, stride as i64, dim as i64, 1];
    let view = |far, heads, dim| {
        let data = bytemuck::cast_slice::<u16, bf16>(far);
        TensorView::strided(data, 0, &[1, tokens, heads, dim], &strides(dim)).expect("inside")
    };
    let inputs = Inputs::new(view(&q[..], 4, 8), view(&k, 2, 8), view(&v, 2, 6));
    let mut far = vec![0u16; (tokens - 1) * stride + 24];
    let (mut state, mut plain) = (State::new(&p, 1).unwrap(), State::new(&p, 1).unwrap());
    let data = bytemuck::cast_slice_mut::<u16, bf16>(&mut far);
    let o = TensorViewMut::strided(data, 0, &[1, tokens, 4, 6], &strides(6)).expect("inside");
    prefill(&p, &inputs, &GATE, &mut state, Outputs::new(o)).expect("valid");
    let want = run(Entry::Prefill, &stream, &mut plain);
    for t in 0..tokens {
        let got = bytemuck::cast_slice::<u16, bf16>(&far[t * stride..][..24]);
        assert_eq!(widen(got), want.o[t * 24..][..24], "token {t}");
    }
}

#[test]
fn log_sum_exp_base_confused() {
    // Natural logarithm: one key gives scale · q·k, and n equal keys add ln n.
    let p = problem(|b| b.scale(0.25));
    let mut stream = Stream::<f32>::normal(&p, 8, 19);
    for t in 1..8 {
        let key = stream.slice(0..1);
        stream.k[t * 16..][..16].copy_from_slice(&key.k);
        stream.q[t * 32..][..32].copy_from_slice(&key.q);
    }
    let (q, k) = (widen(&stream.q), widen(&stream.k));
    for entry in ENTRIES {
        let mut state = State::new(&p, 1).unwrap();
        let out = run_entry(entry, 8, &stream.inputs(), &GATE, &mut state);
        for h in 0..4 {
            let dot: f64 = (0..8).map(|d| q[h * 8 + d] * k[h / 2 * 8 + d]).sum();
            for t in 0..8 {
                let (got, want) = (out.lse[h * 8 + t], 0.25 * dot + (t as f64 + 1.0).ln());
                assert!((got - want).abs() < 1e-5, "head {h}, token {t}: {got}, {want} expected");
            }
        }
    }
}
