//! The operator on views, in batches, token by token; its parts where gradients are tracked.

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use infini_attn_candle::{
    Batch, Parts, Rope, Slots, State, infini_attention, infini_attention_parts,
};
use tracing::Level;

use crate::common::metric::assert_close;
use crate::common::random::{normal, problem, qkv, values};
use crate::common::spans::recorded;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const CPU: Device = Device::Cpu;

fn state(slots: usize, dtype: DType) -> State {
    State::new(&problem(dtype), slots, true, &CPU).expect("a state")
}

fn gate() -> Tensor {
    normal(9, &[4], DType::F32, &CPU).expect("a tensor")
}

/// What a call puts out, and the copies it tells of.
fn called(q: &Tensor, k: &Tensor, v: &Tensor) -> (Vec<f64>, Vec<String>) {
    let mut o = None;
    let told = recorded(Level::DEBUG, || {
        let mut state = state(q.dims()[0], q.dtype());
        o = Some(infini_attention(q, k, v, &gate(), &mut state, &Batch::new()).expect("valid"));
    });
    let copies = told.iter().filter(|record| record.fields.contains_key("strides"));
    (values(&o.expect("called")), copies.map(|record| record.field("name").to_owned()).collect())
}

/// Heads first, narrowed out of one tensor, shared by all sequences: nothing is copied.
#[test]
fn views_are_read_where_they_lie() -> Result<()> {
    for dtype in DTYPES {
        let [q, k, v] = qkv(1, (2, 40), dtype, &CPU)?;
        let (expected, copies) = called(&q, &k, &v);
        assert!(copies.is_empty());
        let heads_first = |t: &Tensor| t.transpose(1, 2)?.contiguous()?.transpose(1, 2);
        let fused = Tensor::cat(&[&q, &k, &v], 2)?;
        let wide = Tensor::cat(&[&q, &q.zeros_like()?], 3)?;
        let later = Tensor::cat(&[&v.i((.., ..3))?, &v], 1)?;
        for [q, k, v] in [
            [heads_first(&q)?, heads_first(&k)?, heads_first(&v)?],
            [fused.narrow(2, 0, 4)?, fused.narrow(2, 4, 2)?, fused.narrow(2, 6, 2)?],
            [wide.narrow(3, 0, 32)?, k.clone(), later.narrow(1, 3, 40)?],
        ] {
            assert_eq!(called(&q, &k, &v), (expected.clone(), vec![]));
        }
    }
    Ok(())
}

/// A last dimension that is not contiguous cannot be read; the copy is told of.
#[test]
fn copies_are_told_of() -> Result<()> {
    let [q, k, v] = qkv(1, (2, 40), DType::BF16, &CPU)?;
    let (expected, _) = called(&q, &k, &v);
    let turned = |t: &Tensor| t.transpose(2, 3)?.contiguous()?.transpose(2, 3);
    let (got, copies) = called(&q, &turned(&k)?, &turned(&v)?);
    assert_eq!((got, copies), (expected, vec!["\"k\"".into(), "\"v\"".into()]));
    Ok(())
}

#[test]
fn packed_padded_and_one_by_one_are_the_same() -> Result<()> {
    let lens = [33, 1, 20];
    for dtype in DTYPES {
        let streams: Vec<_> =
            lens.iter().map(|&n| qkv(n as u64, (1, n), dtype, &CPU)).collect::<Result<_>>()?;
        let mut single = state(3, dtype);
        let mut expected = vec![];
        for (slot, [q, k, v]) in streams.iter().enumerate() {
            let slots = [slot];
            let batch = Batch::new().slots(&slots);
            let o = infini_attention(q, k, v, &gate(), &mut single, &batch)?;
            expected.push(o.squeeze(0)?);
        }
        let expected = values(&Tensor::cat(&expected, 0)?);
        let tolerance = if dtype == DType::F32 { 1e-6 } else { 1e-3 };

        let row = |i: usize| {
            let parts: Vec<_> = streams.iter().map(|s| s[i].squeeze(0)).collect::<Result<_>>()?;
            Tensor::cat(&parts, 0)
        };
        let mut packed = state(3, dtype);
        let batch = Batch::new().cu_seqlens(&[0, 33, 34, 54]);
        let o = infini_attention(&row(0)?, &row(1)?, &row(2)?, &gate(), &mut packed, &batch)?;
        assert_close("packed", &values(&o), &expected, tolerance);

        let pad = |i: usize, left: [usize; 3]| {
            let rows = streams.iter().zip(lens).zip(left).map(|((s, n), left)| {
                let right = 33 - n - left;
                s[i].pad_with_zeros(1, left, right)
            });
            Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
        };
        let cut = |o: &Tensor, left: [usize; 3]| {
            let rows = (0..3).map(|b| o.i((b, left[b]..left[b] + lens[b])));
            Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
        };
        for left in [[0, 0, 0], [0, 30, 5]] {
            let mut padded = state(3, dtype);
            let ranges: Vec<_> =
                (0..3).map(|b| left[b] as i32..(left[b] + lens[b]) as i32).collect();
            let batch = match left {
                [0, 0, 0] => Batch::new().seq_lens(&[33, 1, 20]),
                _ => Batch::new().seq_ranges(&ranges),
            };
            let [q, k, v] = [pad(0, left)?, pad(1, left)?, pad(2, left)?];
            let o = infini_attention(&q, &k, &v, &gate(), &mut padded, &batch)?;
            assert_close("padded", &values(&cut(&o, left)?), &expected, tolerance);
            assert_eq!(values(&o.i((1, left[1] + 1..))?).iter().map(|x| x.abs()).sum::<f64>(), 0.0);
            assert_eq!([0, 1, 2].map(|slot| padded.tokens(slot)), [33, 1, 20]);
        }
    }
    Ok(())
}

/// With a rotation, over ends of segments.
#[test]
fn tokens_are_a_prompt() -> Result<()> {
    let frequencies: Vec<_> = (0..16).map(|i| 1e4f64.powf(-i as f64 / 16.0)).collect();
    let rope = Rope::of_frequencies(&frequencies, 16, &CPU)?;
    let [q, k, v] = qkv(4, (1, 45), DType::F32, &CPU)?;
    let batch = Batch::new().rope(&rope);
    let mut prompt = state(1, DType::F32);
    let expected = infini_attention(&q, &k, &v, &gate(), &mut prompt, &batch)?;
    let mut one = state(1, DType::F32);
    let tokens = (0..45).map(|t| {
        let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(1, t, 1));
        infini_attention(&q?, &k?, &v?, &gate(), &mut one, &batch)
    });
    let tokens = Tensor::cat(&tokens.collect::<Result<Vec<_>>>()?, 1)?;
    assert_close("tokens", &values(&tokens), &values(&expected), 1e-5);
    assert_eq!((one.tokens(0), one.open_len(0)), (45, 13));
    Ok(())
}

/// Rows by places in segments rotate as rows by places in the stream do: only differences matter.
#[test]
fn places_in_segments_are_enough() -> Result<()> {
    let frequencies: Vec<_> = (0..8).map(|i| 0.7f64.powi(i)).collect();
    let [short, long] = [16, 100].map(|rows| Rope::of_frequencies(&frequencies, rows, &CPU));
    let [q, k, v] = qkv(5, (2, 50), DType::F32, &CPU)?;
    let mut twin = [state(2, DType::F32), state(2, DType::F32)];
    let [places, stream] = &mut twin;
    for (tokens, first) in [(21, 0i64), (29, 21)] {
        let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(1, first as usize, tokens));
        let (q, k, v) = (q?, k?, v?);
        let rows: Vec<_> = (first..first + tokens as i64).collect();
        let by_place = Batch::new().rope(short.as_ref().expect("tables"));
        let by_stream = Batch::new().rope(long.as_ref().expect("tables")).positions(&rows);
        let got = infini_attention(&q, &k, &v, &gate(), places, &by_place)?;
        let expected = infini_attention(&q, &k, &v, &gate(), stream, &by_stream)?;
        assert_close("by place", &values(&got), &values(&expected), 1e-5);
    }
    Ok(())
}

#[test]
fn unnamed_slots_keep_their_bits() -> Result<()> {
    let mut state = state(3, DType::F32);
    let [q, k, v] = qkv(6, (3, 23), DType::F32, &CPU)?;
    infini_attention(&q, &k, &v, &gate(), &mut state, &Batch::new())?;
    let bytes = |state: &State| {
        state.to_host_slots(&[1]).and_then(|state| state.to_bytes()).expect("a state")
    };
    let before = bytes(&state);
    let [q, k, v] = qkv(7, (2, 30), DType::F32, &CPU)?;
    infini_attention(&q, &k, &v, &gate(), &mut state, &Batch::new().slots(&[2, 0]))?;
    assert_eq!(bytes(&state), before);
    assert_eq!([0, 1, 2].map(|slot| state.tokens(slot)), [53, 23, 53]);
    Ok(())
}

#[test]
fn parts_are_what_the_gate_mixes() -> Result<()> {
    for dtype in DTYPES {
        let [q, k, v] = qkv(8, (2, 40), dtype, &CPU)?;
        let (mut one, mut other) = (state(2, dtype), state(2, dtype));
        // Asking for more takes another path of the CPU's, so last bits may differ.
        let Parts { o, lse, a_dot, a_mem } =
            infini_attention_parts(&q, &k, &v, &gate(), &mut one, &Batch::new())?;
        let alone = infini_attention(&q, &k, &v, &gate(), &mut other, &Batch::new())?;
        let tolerance = if dtype == DType::F32 { 1e-6 } else { 5e-3 };
        assert_close("o alone", &values(&alone), &values(&o), tolerance);
        assert_eq!((lse.dims(), lse.dtype()), (&[2, 4, 40][..], DType::F32));
        let g = candle_nn::ops::sigmoid(&gate())?.reshape((1, 1, 4, 1))?;
        let [a_dot, a_mem] = [a_dot, a_mem].map(|t| t.to_dtype(DType::F32));
        let (a_dot, a_mem) = (a_dot?, a_mem?);
        let mixed = (a_mem.broadcast_mul(&g)? + a_dot.broadcast_mul(&g.affine(-1.0, 1.0)?)?)?;
        assert_close("o", &values(&o), &values(&mixed), tolerance);
    }
    Ok(())
}

/// Of all four outputs there are no gradients, whichever input tracks them: that is candle's own error.
#[test]
fn parts_have_no_gradients() -> Result<()> {
    let [q, k, v] = qkv(8, (1, 20), DType::F32, &CPU)?;
    let call = |q: &Tensor, k: &Tensor, v: &Tensor, gate: &Tensor| {
        infini_attention_parts(q, k, v, gate, &mut state(1, DType::F32), &Batch::new())
    };
    let expected = call(&q, &k, &v, &gate())?;
    let var = |t: &Tensor| Ok::<_, candle_core::Error>(Var::from_tensor(t)?.into_inner());
    for parts in [
        call(&var(&q)?, &k, &v, &gate())?,
        call(&q, &var(&k)?, &v, &gate())?,
        call(&q, &k, &var(&v)?, &gate())?,
        call(&q, &k, &v, &var(&gate())?)?,
    ] {
        let pairs = [
            (&parts.o, &expected.o),
            (&parts.lse, &expected.lse),
            (&parts.a_dot, &expected.a_dot),
            (&parts.a_mem, &expected.a_mem),
        ];
        for (got, expected) in pairs {
            assert_eq!(values(got), values(expected));
            let error = got.sum_all()?.backward().expect_err("no gradients").to_string();
            assert!(error.contains("backward is not supported for infini-attention"), "{error}");
        }
    }
    expected.o.sum_all()?.backward()?;
    Ok(())
}
