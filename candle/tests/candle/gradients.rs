//! Gradients of the operator in candle's graph, against the float64 reference.

use candle_core::{DType, Device, Result, Tensor, Var};
use infini_attn::reference;
use infini_attn::{Inputs, TensorView};
use infini_attn_candle::{Batch, Rope, State, infini_attention};

use crate::common::metric::assert_close;
use crate::common::random::{normal, problem, qkv, values};

const CPU: Device = Device::Cpu;

/// Gradients to q, k, v and the gate of the loss Σ o · upstream, by candle; those of tensors that are not
/// `tracked` are none.
fn gradients(
    inputs: &[Tensor; 4],
    tracked: [bool; 4],
    upstream: &Tensor,
    (state, batch): (&mut State, &Batch<'_>),
) -> Result<[Option<Vec<f64>>; 4]> {
    let vars = inputs.each_ref().map(|x| Var::from_tensor(x).expect("a variable"));
    let pick = |i: usize| if tracked[i] { vars[i].as_tensor() } else { &inputs[i] };
    let o = infini_attention(pick(0), pick(1), pick(2), pick(3), state, batch)?;
    let store = (o * upstream)?.sum_all()?.backward()?;
    Ok([0, 1, 2, 3].map(|i| store.get(vars[i].as_tensor()).map(values)))
}

fn flat(x: &Tensor) -> Vec<f32> {
    values(x).into_iter().map(|x| x as f32).collect()
}

/// A packed batch in slots of its own, rotated, behind a call that has left segments open: two streams of
/// several segments.
#[test]
fn they_are_the_references() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 4e-3)] {
        let problem = problem(dtype);
        let angles: Vec<f32> = (0..48).map(|i| (i / 3) as f32 * [0.5, 0.1, 0.02][i % 3]).collect();
        let [cos, sin] =
            [f32::cos, f32::sin].map(|f| angles.iter().map(|x| f(*x)).collect::<Vec<_>>());
        let tensor = |table: &Vec<f32>| Tensor::from_slice(table, (16, 3), &CPU);
        let rope = Rope::new(&tensor(&cos)?, &tensor(&sin)?)?;
        let slots = [2, 0];
        let gate = normal(9, &[4], DType::F32, &CPU)?;
        let call = |seed: u64, cu: [i32; 3]| -> Result<_> {
            let [q, k, v] = qkv(seed, (1, cu[2] as usize), dtype, &CPU)?;
            Ok(([q.squeeze(0)?, k.squeeze(0)?, v.squeeze(0)?, gate.clone()], cu))
        };
        let (first, second) = (call(1, [0, 20, 29])?, call(2, [0, 50, 70])?);
        let mut state = State::new(&problem, 3, true, &CPU).expect("a state");
        let mut of_reference = reference::State::new(&problem, 3).expect("a state");
        let [cos, sin] = [&cos, &sin].map(|x| TensorView::new(x, &[16, 3]).expect("a table"));
        let mut start = None;
        let mut results = None;
        for (tensors, cu) in [&first, &second] {
            let batch = Batch::new().cu_seqlens(cu).slots(&slots).rope(&rope);
            let upstream = normal(7, &[cu[2] as usize, 4, 32], dtype, &CPU)?;
            let before = of_reference.clone();
            let places = [0, 1].map(|b| {
                let open = of_reference.open_len(slots[b]) as i64;
                (cu[b]..cu[b + 1]).map(move |t| (open + i64::from(t - cu[b])) % 16)
            });
            let positions: Vec<i64> = places.into_iter().flatten().collect();
            let flats = tensors.each_ref().map(flat);
            let view = |i: usize| {
                TensorView::new(&flats[i], tensors[i].dims()).expect("a tensor of this shape")
            };
            let rotation = infini_attn::Rope::new(cos, sin).positions(&positions);
            let inputs = Inputs::new(view(0), view(1), view(2)).cu_seqlens(cu).slots(&slots);
            let inputs = inputs.rope(rotation);
            let out =
                reference::prefill(&problem, &inputs, &flats[3], &mut of_reference).expect("valid");
            let nothing = vec![0.0; out.o.len()];
            let lse = vec![0.0; out.lse.len()];
            let outputs = reference::Output {
                o: values(&upstream),
                a_dot: nothing.clone(),
                a_mem: nothing,
                lse,
            };
            let mut gradient = reference::StateGradient::new(&of_reference).expect("a gradient");
            let want = reference::prefill_backward(
                &problem,
                &inputs,
                &flats[3],
                &before,
                &outputs,
                &mut gradient,
                None,
            )
            .expect("valid");
            let got = gradients(tensors, [true; 4], &upstream, (&mut state, &batch))?;
            results = Some((want, got));
            start = Some(before);
        }
        let (want, got) = results.expect("two calls");
        assert!(start.expect("two calls").committed(2) == 16, "the memory is not empty");
        let wants = [&want.q, &want.k, &want.v, &want.gate];
        for ((name, want), got) in ["q", "k", "v", "gate"].into_iter().zip(wants).zip(&got) {
            assert_close(name, got.as_ref().expect("tracked"), want, tolerance);
        }
    }
    Ok(())
}

/// Each input alone gets what it gets beside the others, and the others nothing they did not ask for.
#[test]
fn each_input_alone() -> Result<()> {
    let [q, k, v] = qkv(4, (2, 40), DType::F32, &CPU)?;
    let inputs = [q, k, v, normal(9, &[4], DType::F32, &CPU)?];
    let upstream = normal(5, &[2, 40, 4, 32], DType::F32, &CPU)?;
    let run = |tracked| {
        let mut state = State::new(&problem(DType::F32), 2, true, &CPU).expect("a state");
        gradients(&inputs, tracked, &upstream, (&mut state, &Batch::new()))
    };
    let all = run([true; 4])?;
    for i in 0..4 {
        let alone = run([0, 1, 2, 3].map(|j| j == i))?;
        assert!(alone[i] == all[i] && alone[i].is_some(), "input {i}");
        assert!((0..4).all(|j| j == i || alone[j].is_none()), "input {i}");
    }
    Ok(())
}

/// One loss twice, and a sum of two calls on one state: each call is differentiated with its own start.
#[test]
fn calls_are_differentiated_one_by_one() -> Result<()> {
    let [q, k, v] = qkv(6, (1, 40), DType::F32, &CPU)?;
    let (gate, upstream) =
        (normal(9, &[4], DType::F32, &CPU)?, normal(5, &[1, 40, 4, 32], DType::F32, &CPU)?);
    let var = Var::from_tensor(&v)?;
    let mut state = State::new(&problem(DType::F32), 1, true, &CPU).expect("a state");
    let mut call = || infini_attention(&q, &k, var.as_tensor(), &gate, &mut state, &Batch::new());
    let losses = [(call()? * &upstream)?.sum_all()?, (call()? * &upstream)?.sum_all()?];
    let gradient = |loss: &Tensor| {
        Ok::<_, candle_core::Error>(values(loss.backward()?.get(var.as_tensor()).expect("tracked")))
    };
    let (first, again) = (gradient(&losses[0])?, gradient(&losses[0])?);
    assert_eq!(first, again);
    let second = gradient(&losses[1])?;
    let both = gradient(&(&losses[0] + &losses[1])?)?;
    let sum: Vec<f64> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
    assert_close("both", &both, &sum, 1e-6);
    assert!(first != second);
    Ok(())
}
