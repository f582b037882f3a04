//! The operator against the float64 reference and against itself.

use std::thread;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use infini_attn_candle::{Batch, Rope, Slots, State, infini_attention_parts};

use crate::common::random::values;
use crate::data::{DTYPES, HEADS, Scale, call, close, expected, gate, on, tolerance};

fn tokens(qkv: &[Tensor; 3], first: usize, count: usize) -> Result<[Tensor; 3]> {
    let part = |t: &Tensor| t.narrow(1, first, count);
    Ok([part(&qkv[0])?, part(&qkv[1])?, part(&qkv[2])?])
}

/// Prefill, several tokens, single tokens across the end of a segment: as one call.
pub fn a_prompt_and_tokens_after_it(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    for dtype in DTYPES {
        let problem = scale.problem(dtype)?;
        let inputs = scale.inputs(2, scale.segment + 8, dtype)?;
        let qkv = on(device, &inputs)?;
        let mut state = State::new(&problem, 2, false, device)?;
        let prompt = scale.segment - 6;
        let mut outputs = vec![
            call(&tokens(&qkv, 0, prompt)?, &mut state, &Batch::new())?,
            call(&tokens(&qkv, prompt, 4)?, &mut state, &Batch::new())?,
        ];
        for t in prompt + 4..scale.segment + 8 {
            outputs.push(call(&tokens(&qkv, t, 1)?, &mut state, &Batch::new())?);
        }
        let o = Tensor::cat(&outputs, 1)?;
        close("o", &o, &expected(&problem, &inputs)?.o, tolerance(dtype))?;
        ensure!((state.tokens(1), state.open_len(1)) == (scale.segment as u64 + 8, 8));
    }
    Ok(())
}

pub fn packed_is_padded_is_one_by_one(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let (problem, most) = (scale.problem(DType::BF16)?, scale.tokens);
    let inputs = scale.inputs(3, most, DType::BF16)?;
    let qkv = on(device, &inputs)?;
    let lens = [most, 1, scale.segment];
    let row = |b: usize| -> Result<[Tensor; 3]> {
        let of = |t: &Tensor| t.narrow(0, b, 1)?.narrow(1, 0, lens[b]);
        Ok([of(&qkv[0])?, of(&qkv[1])?, of(&qkv[2])?])
    };
    let rows = [row(0)?, row(1)?, row(2)?];
    let all = expected(&problem, &inputs)?.o;
    let width = HEADS * scale.channels;
    let want = |b: usize| &all[b * most * width..][..lens[b] * width];

    let mut alone = State::new(&problem, 3, false, device)?;
    for (b, qkv) in rows.iter().enumerate() {
        let o = call(qkv, &mut alone, &Batch::new().slots(&[2 - b]))?;
        close("one by one", &o, want(b), tolerance(DType::BF16))?;
    }

    let mut padded = State::new(&problem, 3, false, device)?;
    let counts = lens.map(|len| len as i32);
    let o = call(&qkv, &mut padded, &Batch::new().seq_lens(&counts))?;
    for (b, &len) in lens.iter().enumerate() {
        let row = o.narrow(0, b, 1)?;
        close("padded", &row.narrow(1, 0, len)?, want(b), tolerance(DType::BF16))?;
        let padding = values(&row.narrow(1, len, most - len)?);
        ensure!(padding.iter().all(|&x| x == 0.0), "padding of sequence {b}");
    }

    let mut packed = State::new(&problem, 3, false, device)?;
    let pack =
        |i: usize| Tensor::cat(&rows.each_ref().map(|row| row[i].squeeze(0).expect("one")), 0);
    let one_row = [pack(0)?, pack(1)?, pack(2)?];
    let ends: Vec<i32> = [0]
        .into_iter()
        .chain(counts)
        .scan(0, |end, n| {
            *end += n;
            Some(*end)
        })
        .collect();
    let o = call(&one_row, &mut packed, &Batch::new().cu_seqlens(&ends))?;
    for (b, &len) in lens.iter().enumerate() {
        let part = o.narrow(0, ends[b] as usize, len)?;
        close("packed", &part, want(b), tolerance(DType::BF16))?;
        ensure!([&padded, &packed].iter().all(|s| s.tokens(b) == len as u64));
        ensure!(alone.tokens(2 - b) == len as u64);
    }
    Ok(())
}

pub fn parts(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    for dtype in DTYPES {
        let problem = scale.problem(dtype)?;
        let inputs = scale.inputs(2, scale.tokens, dtype)?;
        let [q, k, v] = on(device, &inputs)?;
        let mut state = State::new(&problem, 2, false, device)?;
        let parts = infini_attention_parts(&q, &k, &v, &gate(device)?, &mut state, &Batch::new())?;
        let want = expected(&problem, &inputs)?;
        ensure!(parts.lse.dims() == [2, HEADS, scale.tokens] && parts.lse.dtype() == DType::F32);
        close("lse", &parts.lse, &want.lse, tolerance(dtype))?;
        for (name, got, want) in [
            ("o", parts.o, want.o),
            ("a_dot", parts.a_dot, want.a_dot),
            ("a_mem", parts.a_mem, want.a_mem),
        ] {
            close(name, &got, &want, tolerance(dtype))?;
        }
    }
    Ok(())
}

/// A rotation, by its tables and by positions of the caller's.
pub fn rotated_as_on_the_cpu(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::F16)?;
    let inputs = scale.inputs(1, scale.tokens, DType::F16)?;
    let frequencies: Vec<f64> =
        (0..scale.channels / 2).map(|i| 0.5f64.powf(i as f64 / 2.0)).collect();
    let positions: Vec<i64> =
        (0..scale.tokens as i64).map(|t| t * 7 % scale.segment as i64).collect();
    let run = |device: &Device, interleaved: bool, own: bool| {
        let rope =
            Rope::of_frequencies(&frequencies, scale.segment, device)?.interleaved(interleaved);
        let batch = Batch::new().rope(&rope);
        let batch = if own { batch.positions(&positions) } else { batch };
        let mut state = State::new(&problem, 1, true, device)?;
        call(&on(device, &inputs)?, &mut state, &batch)
    };
    for (interleaved, own) in [(false, false), (true, false), (false, true)] {
        let want = values(&run(&Device::Cpu, interleaved, own)?);
        // Keys are rounded once more after they were rotated.
        close("o", &run(device, interleaved, own)?, &want, 2.0 * tolerance(DType::F16))?;
    }
    Ok(())
}

/// States of one device in several threads: work goes to one stream, whoever asks for it.
pub fn threads_take_turns(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::F16)?;
    let inputs = scale.inputs(1, scale.tokens, DType::F16)?;
    let qkv = on(device, &inputs)?;
    let want = expected(&problem, &inputs)?.o;
    let mut state = State::new(&problem, 1, false, device)?;
    let half = scale.tokens / 2;
    let [first, second] = [tokens(&qkv, 0, half)?, tokens(&qkv, half, scale.tokens - half)?];
    let front = call(&first, &mut state, &Batch::new())?;
    let (state, alone) = thread::scope(|scope| {
        let moved = scope.spawn(move || call(&second, &mut state, &Batch::new()));
        let beside = scope.spawn(|| {
            let mut state = State::new(&problem, 1, false, device)?;
            call(&qkv, &mut state, &Batch::new())
        });
        (moved.join().expect("no panic"), beside.join().expect("no panic"))
    });
    close("moved", &Tensor::cat(&[front, state?], 1)?, &want, tolerance(DType::F16))?;
    close("beside", &alone?, &want, tolerance(DType::F16))
}

/// No tokens are a call as well.
pub fn nothing_new(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::BF16)?;
    let inputs = scale.inputs(1, scale.tokens, DType::BF16)?;
    let qkv = on(device, &inputs)?;
    let mut state = State::new(&problem, 1, false, device)?;
    call(&tokens(&qkv, 0, 20)?, &mut state, &Batch::new())?;
    let o = call(&tokens(&qkv, 20, 0)?, &mut state, &Batch::new())?;
    ensure!(o.dims() == [1, 0, HEADS, scale.channels] && state.tokens(0) == 20);
    let o = call(&tokens(&qkv, 20, scale.tokens - 20)?, &mut state, &Batch::new())?;
    let want = expected(&problem, &inputs)?.o;
    close("o", &o, &want[20 * HEADS * scale.channels..], tolerance(DType::BF16))
}

/// Where an input tracks gradients: the same outputs, and no gradients.
pub fn tracked(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::BF16)?;
    let inputs = scale.inputs(1, scale.tokens, DType::BF16)?;
    let [q, k, v] = on(device, &inputs)?;
    let want = expected(&problem, &inputs)?;
    let q = Var::from_tensor(&q)?;
    let mut state = State::new(&problem, 1, false, device)?;
    let parts = infini_attention_parts(&q, &k, &v, &gate(device)?, &mut state, &Batch::new())?;
    close("o", &parts.o, &want.o, tolerance(DType::BF16))?;
    close("a_mem", &parts.a_mem, &want.a_mem, tolerance(DType::BF16))?;
    let error = parts.o.sum_all()?.backward().err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(error.contains("backward is not supported for infini-attention"), "{error}");
    Ok(())
}
