//! `prefill_backward` on the table of cases, and what else holds of it.

mod backend;
mod fixture;
mod refusals;

use crate::common::cases::{Case, cases};
use crate::common::driver::Summary;
use crate::common::extremes::extremes;
use crate::common::gradients::run_gradients;
use crate::common::metric::relative_rms;
use crate::common::stream::{Stream, normals};
use crate::common::{narrow, widen};
use backend::Cpu;
use fixture::Fixture;
use infini_attn::{
    DType, Denominator, Element, EmptyMemory, InputGradients, OutputGradients, Outputs, Problem,
    State, StateGradient, Tape, TensorView, TensorViewMut, Update, prefill, prefill_backward,
    reference,
};

fn run(backend: Cpu, cases: &[Case], bptt_segments: Option<usize>) -> Summary {
    let summary = run_gradients(&backend, cases, bptt_segments).finish(&format!("{backend:?}"));
    assert_eq!(summary.ran, cases.len());
    summary
}

#[test]
fn the_whole_table() {
    assert_eq!(run(Cpu::Every(1), &cases(), None).ran, 757);
}

/// Cases of many segments in a call.
fn several_segments() -> Vec<Case> {
    let several = |c: &Case| {
        let n = c.problem.segment_len();
        c.calls.iter().flatten().any(|&len| (2 * n..200 * n).contains(&len))
    };
    let all: Vec<Case> = cases().into_iter().filter(several).collect();
    assert_eq!(all.len(), 343);
    all
}

#[test]
fn tapes_of_fewer_segments() {
    let all = several_segments();
    let some = |i| all.iter().skip(i).step_by(9).cloned().collect::<Vec<_>>();
    run(Cpu::Every(3), &some(0), None);
    run(Cpu::New, &some(3), None);
    run(Cpu::Of, &some(6), None);
}

/// Several segments in a call of few tokens.
#[test]
fn tapes_of_decodes() {
    let short = |c: &Case| {
        let n = c.problem.segment_len();
        c.largest_chunk() <= 16 && c.calls.iter().flatten().any(|&len| len >= 2 * n)
    };
    let all: Vec<Case> = cases().into_iter().filter(short).collect();
    assert!(all.len() >= 30, "{}", all.len());
    run(Cpu::Decode, &all, None);
}

/// What a local branch under a nearly open gate gives its keys, here those of the open segment, which
/// give nothing to the memory: (1 − g) G·A_dot must not be a difference of rounded numbers.
#[test]
fn nearly_open_gates() {
    for beta in [3.0, 8.0, 14.0] {
        keys_of_the_open_segment::<f32>(beta, 1e-5);
        // What is smaller f16 does not resolve.
        if beta < 10.0 {
            keys_of_the_open_segment::<half::f16>(beta, 1e-3);
        }
        keys_of_the_open_segment::<half::bf16>(beta, 4e-3);
    }
}

fn keys_of_the_open_segment<T: Element>(beta: f32, tolerance: f64) {
    let p = Problem::builder().heads(2).kv_heads(1).head_dim(32).segment_len(64);
    let p = p.dtype(T::DTYPE).build().expect("valid");
    let stream = Stream::<T>::normal(&p, 64 + 50, 5);
    let [got, want] = both_sides(&p, &stream, &[beta; 2]);
    let check = |what: &str, got: &[f64], want: &[f64]| {
        let error = relative_rms(what, got, want, &[got.len()], tolerance);
        error.unwrap_or_else(|e| panic!("{} β = {beta}: {e}", T::DTYPE));
    };
    check("dk", &got[1][64 * 32..], &want[1][64 * 32..]);
    check("dβ", &got[3], &want[3]);
}

/// dq, dk, dv and dβ of a new stream in one call, from random dL/do: ours, and the reference's.
fn both_sides<T: Element>(p: &Problem, stream: &Stream<T>, gate: &[f32]) -> [[Vec<f64>; 4]; 2] {
    let (heads, kv_heads, tokens) = (p.heads(), p.kv_heads(), stream.tokens);
    let up: Vec<T> = narrow(&normals(6, tokens * heads * p.value_dim()));
    let (inputs, of_o) = (stream.inputs(), [1, tokens, heads, p.value_dim()]);

    let (mut o, mut lse) = (up.clone(), vec![0.0; heads * tokens]);
    let (mut state, mut tape) = (State::new(p, 1).expect("room"), Tape::new());
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &of_o).expect("its shape"))
        .lse(TensorViewMut::new(&mut lse, &[1, heads, tokens]).expect("its shape"))
        .tape(&mut tape);
    prefill(p, &inputs, gate, &mut state, outputs).expect("valid");
    let view = |x| TensorView::new(x, &of_o).expect("its shape");
    let lse = TensorView::new(&lse, &[1, heads, tokens]).expect("its shape");
    let (mut dq, mut dk, mut dv) = (stream.q.clone(), stream.k.clone(), stream.v.clone());
    let mut d_gate = vec![0.0; heads];
    let into = |x, heads, dim| TensorViewMut::new(x, &[1, tokens, heads, dim]).expect("its shape");
    let gradients = InputGradients::new(
        into(&mut dq, heads, p.key_dim()),
        into(&mut dk, kv_heads, p.key_dim()),
        into(&mut dv, kv_heads, p.value_dim()),
        &mut d_gate,
    );
    let mut d_state = StateGradient::new(p, 1).expect("room");
    let given = OutputGradients::new(view(&o), lse, view(&up));
    prefill_backward(p, &inputs, gate, &tape, &given, &mut d_state, gradients).expect("valid");

    let mut exact = reference::State::new(p, 1).expect("room");
    let start = exact.clone();
    let mut out = reference::prefill(p, &inputs, gate, &mut exact).expect("valid");
    let mut gradient = reference::StateGradient::new(&exact).expect("room");
    out.o = widen(&up);
    [&mut out.a_dot, &mut out.a_mem, &mut out.lse].into_iter().for_each(|x| x.fill(0.0));
    let want = reference::prefill_backward(p, &inputs, gate, &start, &out, &mut gradient, None);
    let want = want.expect("valid");
    [[widen(&dq), widen(&dk), widen(&dv), widen(&d_gate)], [want.q, want.k, want.v, want.gate]]
}

/// σ(0)·z is ε exactly: as PyTorch's `clamp` has it, the denominator still moves.
#[test]
fn a_denominator_at_its_bound_moves() {
    let p = Problem::builder().heads(1).head_dim(4).segment_len(2).update(Update::Delta);
    let p = p.denominator(Denominator::Clamp(8.0)).build().expect("valid");
    let zeros = |which, x| if which == 'v' { x } else { 0.0 };
    let [got, want] = both_sides(&p, &Stream::<f32>::from_fn(&p, 4, 5, zeros), &[0.5]);
    for ((name, got), want) in ["dq", "dk", "dv", "dβ"].into_iter().zip(&got).zip(&want) {
        relative_rms(name, got, want, &[got.len()], 1e-5).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn truncated_propagation() {
    let all = several_segments();
    for (i, (tape, block)) in
        [(Cpu::Every(1), 1), (Cpu::Every(3), 2), (Cpu::Of, 3)].into_iter().enumerate()
    {
        run(tape, &all.iter().skip(3 * i + 1).step_by(9).cloned().collect::<Vec<_>>(), Some(block));
    }
}

/// A denominator that is clamped gives nothing to σ(q), σ(k) and z. Of some rows it is: the normaliser
/// grows past twice what one segment adds.
#[test]
fn clamped_denominators() {
    let clamped = |case: &Case| {
        let (n, dk) = (case.problem.segment_len(), case.problem.key_dim());
        let clamp = Denominator::Clamp(2.5 * (n * dk) as f32);
        let problem = case.problem.to_builder().denominator(clamp).build().expect("valid");
        Case { problem, ..case.clone() }
    };
    let all: Vec<_> = several_segments().iter().skip(2).step_by(9).map(clamped).collect();
    run(Cpu::Every(1), &all, None);
}

/// A local branch that is closed gives nothing of its values, whatever they are, beside the gradient to
/// its log-sum-exp.
#[test]
fn a_closed_branch_may_hold_anything() {
    let p = Problem::builder().heads(2).kv_heads(1).head_dim(8).segment_len(16);
    let p = p.empty_memory(EmptyMemory::Gate).build().expect("valid");
    let mut stream = Stream::<f32>::normal(&p, 6, 3);
    stream.v.fill(f32::NAN);
    let mut fixture = Fixture::new(&p, &[6], &stream, &[0, 6]);
    fixture.gate.fill(f32::INFINITY);
    let lse = Box::leak(Box::new(fixture.out.lse.clone().expect("asked for"))).view();
    let of_o = TensorView::new(&[0.0; 6 * 2 * 8], &[6, 2, 8]).expect("its shape");
    let d_lse = TensorView::new(&[1.0; 2 * 6], &[2, 6]).expect("its shape");
    let outputs = OutputGradients::new(of_o, lse, of_o).lse(d_lse);
    fixture.backward(|a| a.outputs = outputs).expect("valid");
    for (t, h) in (0..12).map(|i| (i / 2, i % 2)) {
        let dq = fixture.into.q.row(&[t, h]);
        assert!(dq.iter().all(|dq| dq.is_finite() && *dq != 0.0), "{dq:?}");
        assert!(fixture.into.v.row(&[t, 0]).iter().all(|dv| *dv == 0.0));
    }
    assert!(fixture.into.gate.iter().all(|d_gate| *d_gate == 0.0));
}

#[test]
fn extremes_are_as_right() {
    let all = [DType::F32, DType::BF16].map(|dtype| extremes((dtype, 64, 64))).concat();
    run(Cpu::Every(1), &all, None);
}

/// One call of several sequences, backward with N(0, 1) everywhere: all gradients' bits.
fn bits<T: Element>(
    p: &Problem,
    (sequences, tokens): (usize, usize),
    tape: Tape,
    threads: usize,
) -> Vec<u8> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    let stream = Stream::<T>::normal(p, sequences * tokens, 8);
    let lead = [sequences * tokens];
    let cu: Vec<i32> = (0..=sequences).map(|b| (b * tokens) as i32).collect();
    pool.install(|| {
        let mut fixture = Fixture::<T>::taped(p, &lead, &stream, &cu, tape);
        fixture.backward(|_| {}).expect("a valid call");
        let mut bits = fixture.into.bits();
        let gradient = &fixture.gradient;
        let memory = gradient.memory().as_slice().expect("contiguous").to_vec();
        let normalizer = gradient.normalizer().as_slice().expect("contiguous").to_vec();
        bits.extend(memory.iter().chain(&normalizer).flat_map(|x| x.to_le_bytes()));
        bits
    })
}

/// The number of threads changes no bit.
fn threads<T: Element>() {
    // (query heads, KV heads, N, sequences, tokens): one long sequence on one head, and several; more
    // segments than a run of them has anywhere.
    for (heads, kv_heads, n, sequences, tokens) in
        [(4, 1, 32, 1, 500), (4, 2, 48, 3, 130), (2, 2, 97, 1, 97), (2, 2, 2, 1, 600)]
    {
        for update in [Update::Linear, Update::Delta] {
            let p = Problem::builder().heads(heads).kv_heads(kv_heads).head_dim(64).segment_len(n);
            let p = p.dtype(T::DTYPE).update(update).build().expect("valid");
            for every in [None, Some(2)] {
                let tape = || every.map_or(Tape::new(), |n| Tape::every(n).expect("a tape"));
                let bits = |threads| bits::<T>(&p, (sequences, tokens), tape(), threads);
                let one = bits(1);
                for threads in [1, 2, 3, 7] {
                    let what = format!("{update} {} N={n} {every:?}", T::DTYPE);
                    assert!(bits(threads) == one, "{what}: {threads} threads");
                }
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    threads::<f32>();
    threads::<half::bf16>();
}
