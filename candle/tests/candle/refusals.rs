//! What does not fit is refused by its name, and nothing has changed then.

use candle_core::{DType, Device, Result, Tensor};
use infini_attn_candle::{Batch, Config, Rope, Slots, State, infini_attention};

use crate::common::random::{config, normal, problem, qkv};

const CPU: Device = Device::Cpu;

#[track_caller]
fn says<T>(result: Result<T>, wanted: &str) {
    let error = result.err().unwrap_or_else(|| panic!("accepted: {wanted}")).to_string();
    assert!(error.contains(wanted), "{error}\n{wanted}");
}

#[test]
fn tensors() -> Result<()> {
    let mut state = State::new(&problem(DType::F32), 2, false, &CPU)?;
    let [q, k, v] = qkv(1, (2, 20), DType::F32, &CPU)?;
    let gate = normal(4, &[4], DType::F32, &CPU)?;
    infini_attention(&q, &k, &v, &gate, &mut state, &Batch::new())?;
    let before = state.to_host()?.to_bytes().expect("a state");
    let half = |t: &Tensor| t.to_dtype(DType::F16);
    let rope = Rope::of_frequencies(&[1.0; 17], 16, &CPU)?;
    let new = Batch::new();
    let (q3, k1) = (q.narrow(2, 0, 3)?, k.narrow(2, 0, 1)?);
    for (call, wanted) in [
        ((&half(&q)?, &k, &v, &gate, new), "q: dtype f16 given, f32 (the problem's) expected"),
        ((&q, &half(&k)?, &v, &gate, new), "k: dtype f16 given, f32 (the problem's) expected"),
        ((&q, &k, &v.to_dtype(DType::F64)?, &gate, new), "v: dtype f64 given"),
        ((&q3, &k, &v, &gate, new), "q: shape [2, 20, 3, 32] given, "),
        ((&q, &k1, &v, &gate, new), "k: shape [2, 20, 1, 32] given, "),
        ((&q, &k, &v.narrow(1, 0, 19)?, &gate, new), "v: shape [2, 19, 2, 32] given, "),
        ((&q.get(0)?, &k, &v, &gate, new), "q: shape [20, 4, 32] given, rank 4"),
        ((&q, &k.unsqueeze(0)?, &v, &gate, new), "k: shape [1, 2, 20, 2, 32] given, rank 4"),
        ((&q, &k, &gate.get(0)?, &gate, new), "v: shape [] given, rank 4 [B, T, H, D] expected"),
        (
            (&q, &k, &v, &gate, new.positions(&[3; 20])),
            "positions: 20 rows without a rotation given",
        ),
        ((&q, &k, &v, &gate.narrow(0, 0, 3)?, new), "gate: 3 elements given, 4"),
        ((&q, &k, &v, &half(&gate)?, new), "gate: f16 [4] given, f32 [4] expected"),
        ((&q, &k, &v, &gate.unsqueeze(0)?, new), "gate: f32 [1, 4] given, f32 [4] expected"),
        ((&q, &k, &v, &Tensor::new(&[0f32, 0., f32::NAN, 0.], &CPU)?, new), "gate[2]: NaN given"),
        ((&q, &k, &v, &gate, new.slots(&[0])), "slots: 1 elements given, 2"),
        ((&q, &k, &v, &gate, new.slots(&[0, 2])), "slots[1]: 2 given"),
        ((&q, &k, &v, &gate, new.slots(&[1, 1])), "slots[1]: 1 given"),
        ((&q, &k, &v, &gate, new.seq_lens(&[3, 21])), "seq_lens[1]: 21 given"),
        ((&q, &k, &v, &gate, new.seq_lens(&[3, -1])), "seq_lens[1]: -1 given"),
        ((&q, &k, &v, &gate, new.seq_lens(&[3])), "seq_lens: 1 elements given, 2"),
        (
            (&q, &k, &v, &gate, new.cu_seqlens(&[0, 20, 40])),
            "q: shape [2, 20, 4, 32] given, rank 3",
        ),
        ((&q, &k, &v, &gate, new.rope(&rope)), "brought without rotation, this call comes with it"),
    ] {
        let (q, k, v, gate, batch) = call;
        says(infini_attention(q, k, v, gate, &mut state, &batch), wanted);
    }
    assert_eq!(state.to_host()?.to_bytes().expect("a state"), before);
    Ok(())
}

#[test]
fn rotations() -> Result<()> {
    let table = |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F32, &CPU);
    says(Rope::new(&table(4, 2)?.flatten_all()?, &table(4, 2)?), "cos: shape [8] given");
    says(Rope::new(&table(4, 2)?, &table(4, 3)?), "sin: shape [4, 3] given, [4, 2] (that of cos)");
    let mut state = State::new(&problem(DType::F32), 1, true, &CPU)?;
    let [q, k, v] = qkv(1, (1, 20), DType::F32, &CPU)?;
    let gate = Tensor::zeros(4, DType::F32, &CPU)?;
    // Fewer rows than places.
    let rope = Rope::of_frequencies(&[1.0; 16], 15, &CPU)?;
    let result = infini_attention(&q, &k, &v, &gate, &mut state, &Batch::new().rope(&rope));
    says(result, "positions");
    let rope = Rope::of_frequencies(&[1.0; 16], 16, &CPU)?;
    let batch = Batch::new().rope(&rope).positions(&[1, 2]);
    says(infini_attention(&q, &k, &v, &gate, &mut state, &batch), "positions: 2 elements given");
    let rope = Rope::of_frequencies(&[1.0; 17], 16, &CPU)?;
    let batch = Batch::new().rope(&rope);
    says(infini_attention(&q, &k, &v, &gate, &mut state, &batch), "cos: shape [16, 17] given");
    assert_eq!(state.tokens(0), 0);
    says(Rope::of_frequencies(&[1.0; 16], usize::MAX, &CPU), "cos: ");
    // More tokens than memory has places, or than can be counted.
    let batch = Batch::new().rope(&rope);
    for shape in [[1 << 22, 1 << 22, 1, 1], [1 << 40, 1 << 40, 1, 1]] {
        let q = Tensor::zeros((1, 1, 1, 1), DType::F32, &CPU)?.broadcast_as(&shape)?;
        says(infini_attention(&q, &q, &q, &gate, &mut state, &batch), "positions: ");
        says(infini_attention(&q, &q, &q, &gate, &mut state, &Batch::new()), "o: ");
    }
    Ok(())
}

#[test]
fn states() {
    says(State::new(&problem(DType::F32), usize::MAX, false, &CPU), "has not so much");
    let error = infini_attn_candle::element_type(DType::U8);
    says(error, "dtype: U8 given, F32, F16 or BF16 expected");
}

#[test]
fn configurations() {
    let check = |change: fn(&mut Config), wanted: &str| {
        let mut changed = config();
        change(&mut changed);
        says(changed.check(), wanted);
    };
    config().check().expect("valid");
    check(|c| c.model_type = "gpt2".into(), "model_type: gpt2 given, llama, mistral, qwen2, qwen3");
    check(|c| c.hidden_act = Some("gelu".into()), "hidden_act: gelu given, silu expected");
    let window = |model_type: &str, used: Option<bool>| {
        let model_type = model_type.into();
        let sliding_window = Some(4096);
        Config { model_type, sliding_window, use_sliding_window: used, ..config() }.check()
    };
    says(window("mistral", None), "sliding_window: 4096 given, null");
    says(window("qwen2", Some(true)), "sliding_window: 4096 given, null");
    window("qwen2", None).expect("not in use");
    window("qwen3", Some(false)).expect("not in use");
    check(
        |c| c.quantization_config = Some("fp8".into()),
        "quantization_config: \"fp8\" given, none",
    );
    check(|c| c.hidden_size = 0, "hidden_size: 0 given, 1 or more expected");
    check(|c| c.vocab_size = 0, "vocab_size: 0 given");
    check(|c| c.num_hidden_layers = 1 << 45, "num_hidden_layers: 35184372088832 given, 1 to 65536");
    check(
        |c| (c.head_dim, c.infini_attention) = (Some(1 << 50), None),
        "key_dim: 1125899906842624 given",
    );
    check(|c| (c.head_dim, c.infini_attention) = (Some(1 << 63), None), "key_dim: ");
    check(|c| c.head_dim = Some(0), "key_dim: 0 given");
    check(|c| c.num_attention_heads = 1 << 40, "heads: ");
    check(
        |c| c.rope_theta = Some(-5.0),
        "rope_parameters.rope_theta: -5 given, a number > 0 expected",
    );
    let gate = |c: &mut Config| c.infini_attention.as_mut().expect("settings").gate = f64::NAN;
    check(gate, "infini_attention.gate: NaN given");
    check(|c| c.num_hidden_layers = 0, "num_hidden_layers: 0 given");
    check(|c| c.num_key_value_heads = Some(3), "kv_heads: 3 given, a divisor of heads = 4");
    let rope = |rope_type: &str, factor| {
        let mut c = config();
        let rope_type = Some(rope_type.to_owned());
        c.rope_parameters =
            Some(infini_attn_candle::RopeParameters { rope_type, factor, ..Default::default() });
        c.check()
    };
    says(rope("yarn", Some(2.0)), "rope_type: yarn given, default, linear or llama3 expected");
    says(rope("linear", None), "rope_parameters.factor: none given");
    says(rope("llama3", Some(8.0)), "rope_parameters.low_freq_factor: none given");
    let mut c = config();
    let number = Some(4.0);
    c.rope_scaling = Some(infini_attn_candle::RopeParameters {
        rope_type: Some("llama3".into()),
        factor: number,
        low_freq_factor: number,
        high_freq_factor: number,
        original_max_position_embeddings: number,
        ..Default::default()
    });
    says(c.check(), "high_freq_factor: 4 given, more than low_freq_factor = 4 expected");
    let without = Config { infini_attention: None, ..config() };
    without.check().expect("not asked for yet");
    says(without.problem(DType::F32), "infini_attention: none given");
    let path = std::env::temp_dir().join(format!("no-config-{}", std::process::id()));
    says(Config::from_file(&path), &path.display().to_string());
    std::fs::write(&path, "{}").expect("a file");
    says(Config::from_file(&path), "missing field `model_type`");
    std::fs::remove_file(&path).ok();
}
