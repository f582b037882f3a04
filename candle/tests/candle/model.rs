//! The model against plain candle, and as an engine uses it.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::ops::{sigmoid, softmax};
use infini_attn_candle::{Batch, Cache, Config, InfiniAttention, Model, Slot, Slots, State};

use crate::common::metric::assert_close;
use crate::common::random::{builder, config, normal, tokens, values, weights};

const CPU: Device = Device::Cpu;

/// The same mathematics in candle's operations, whole streams at once: logits of every token, [T, V].
fn plain(config: &Config, w: &HashMap<String, Tensor>, tokens: &[u32]) -> Result<Tensor> {
    // Not candle's fast norm and softmax: they have no gradients.
    let norm = |x: &Tensor, name: &str| candle_nn::ops::rms_norm_slow(x, &w[name], 1e-6);
    let linear = |x: &Tensor, name: String| x.matmul(&w[&name].t()?);
    let mut x = w["model.embed_tokens.weight"].index_select(&Tensor::new(tokens, &CPU)?, 0)?;
    for i in 0..config.num_hidden_layers {
        let name = |name: &str| format!("model.layers.{i}.{name}");
        let h = norm(&x, &name("input_layernorm.weight"))?;
        // [H, T, D], with keys and values for each query head.
        let heads = |which: &str, repeat: usize| -> Result<Tensor> {
            let y = linear(&h, name(&format!("self_attn.{which}_proj.weight")))?;
            let y = y.reshape((tokens.len(), (), 1, 32))?.repeat((1, 1, repeat, 1))?;
            y.reshape((tokens.len(), 4, 32))?.transpose(0, 1)?.contiguous()
        };
        let gate = sigmoid(&w[&name("self_attn.beta")])?.reshape((4, 1, 1))?;
        let o = infini(&heads("q", 1)?, &heads("k", 2)?, &heads("v", 2)?, &gate)?;
        let o = o.transpose(0, 1)?.flatten_from(1)?;
        x = (x + linear(&o, name("self_attn.o_proj.weight"))?)?;
        let h = norm(&x, &name("post_attention_layernorm.weight"))?;
        let inner = linear(&h, name("mlp.gate_proj.weight"))?.silu()?;
        let inner = (inner * linear(&h, name("mlp.up_proj.weight"))?)?;
        x = (x + linear(&inner, name("mlp.down_proj.weight"))?)?;
    }
    linear(&norm(&x, "model.norm.weight")?, "lm_head.weight".into())
}

/// Infini-attention with the delta rule, segment after segment of 16 tokens; [H, T, D] each. While the
/// memory is empty the gate is bypassed.
fn infini(q: &Tensor, k: &Tensor, v: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let sigma = |x: &Tensor| x.elu(1.0)? + 1.0;
    let (mut m, mut z) = (Tensor::zeros((4, 32, 32), DType::F32, &CPU)?, None::<Tensor>);
    let mut out = vec![];
    for start in (0..q.dim(1)?).step_by(16) {
        let n = 16.min(q.dim(1)? - start);
        let [q, k, v] = [q, k, v].map(|x| x.narrow(1, start, n));
        let (q, k, v) = (q?.contiguous()?, k?.contiguous()?, v?.contiguous()?);
        let mask: Vec<f32> = (0..n * n).map(|i| if i % n > i / n { -1e30 } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (n, n), &CPU)?;
        let scores = (rotated(&q)?.matmul(&rotated(&k)?.t()?)? / 32f64.sqrt())?;
        let local = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.matmul(&v)?;
        let (of_q, of_k) = (sigma(&q)?, sigma(&k)?);
        let (o, known) = match &z {
            None => (local, None),
            Some(z) => {
                let read = |x: &Tensor| x.matmul(&m)?.broadcast_div(&x.matmul(z)?);
                let rest = local.broadcast_mul(&gate.affine(-1.0, 1.0)?)?;
                ((read(&of_q)?.broadcast_mul(gate)? + rest)?, Some(read(&of_k)?))
            }
        };
        out.push(o);
        let new = match known {
            Some(known) => (v - known)?,
            None => v,
        };
        m = (m + of_k.t()?.matmul(&new)?)?;
        let sum = of_k.sum_keepdim(1)?.t()?;
        z = Some(z.map_or(Ok(sum.clone()), |z| z + &sum)?.contiguous()?);
    }
    Tensor::cat(&out, 1)
}

/// By places in the segment, channel i with i + 16.
fn rotated(x: &Tensor) -> Result<Tensor> {
    let half = (0..16).map(|i| 1e4f32.powf(-i as f32 / 16.0)).collect::<Vec<_>>();
    let places = Tensor::arange(0f32, x.dim(1)? as f32, &CPU)?.unsqueeze(1)?;
    let angles = places.broadcast_mul(&Tensor::from_vec(half, (1, 16), &CPU)?)?;
    candle_nn::rotary_emb::rope_slow(&x.unsqueeze(0)?, &angles.cos()?, &angles.sin()?)?.squeeze(0)
}

fn loaded(slots: usize) -> Result<(Model, Cache, Vec<Slot>)> {
    let config = config();
    let model = Model::load(&config, builder(&config, DType::F32, &CPU)?)?;
    let mut cache = Cache::new(&config, slots, DType::F32, &CPU)?;
    let slots = (0..slots).map(|_| cache.pool_mut().allocate().expect("a slot")).collect();
    Ok((model, cache, slots))
}

fn ids(tokens: &[u32]) -> Result<Tensor> {
    Tensor::new(tokens, &CPU)
}

#[test]
fn it_computes_what_plain_candle_computes() -> Result<()> {
    let (model, mut cache, slots) = loaded(2)?;
    let text = tokens(53, 1);
    let expected = plain(&config(), &weights(&config(), &CPU)?, &text)?;
    let prompt = model.forward(&ids(&text)?, &[(slots[0], 53)], &mut cache)?;
    assert_eq!((prompt.dims(), prompt.dtype()), (&[1, 50][..], DType::F32));
    assert_close("prompt", &values(&prompt), &values(&expected.get(52)?), 2e-5);
    let each =
        text.iter().map(|&token| model.forward(&ids(&[token])?, &[(slots[1], 1)], &mut cache));
    let each = Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?;
    assert_close("token by token", &values(&each), &values(&expected), 2e-5);
    Ok(())
}

#[test]
fn prompts_and_tokens_share_a_step() -> Result<()> {
    let (model, mut cache, slots) = loaded(4)?;
    let texts = [tokens(40, 1), tokens(7, 2), tokens(1, 3)];
    let alone = |text: &[u32], cache: &mut Cache| {
        cache.pool_mut().reset(slots[3]).expect("a slot");
        model.forward(&ids(text)?, &[(slots[3], text.len())], cache)
    };
    let expected: Vec<_> = texts.iter().map(|t| alone(t, &mut cache)).collect::<Result<_>>()?;
    let expected = values(&Tensor::cat(&expected, 0)?);
    let sequences = [(slots[2], 40), (slots[0], 7), (slots[1], 1)];

    let packed = model.forward(&ids(&texts.concat())?, &sequences, &mut cache)?;
    assert_close("packed", &values(&packed), &expected, 1e-5);
    slots[..3].iter().for_each(|&slot| cache.pool_mut().reset(slot).expect("a slot"));
    let rows = texts.map(|mut text| {
        text.resize(40, 49);
        text
    });
    let padded = model.forward(&ids(&rows.concat())?.reshape((3, 40))?, &sequences, &mut cache)?;
    assert_close("padded", &values(&padded), &expected, 1e-5);
    assert_eq!(sequences.map(|(slot, _)| cache.pool().tokens(slot).expect("a slot")), [40, 7, 1]);
    Ok(())
}

#[test]
fn conversations_fork_and_go_to_disk() -> Result<()> {
    let (model, mut cache, slots) = loaded(2)?;
    cache.pool_mut().free(slots[1]).expect("a slot");
    model.forward(&ids(&tokens(37, 1))?, &[(slots[0], 37)], &mut cache)?;
    let fork = cache.pool_mut().fork(slots[0]).expect("room");
    let path =
        std::env::temp_dir().join(format!("conversation-{}.safetensors", std::process::id()));
    cache.save(slots[0], &path)?;
    let more = ids(&tokens(20, 2))?;
    let one = model.forward(&more, &[(slots[0], 20)], &mut cache)?;
    let other = model.forward(&more, &[(fork, 20)], &mut cache)?;
    cache.load(fork, &path)?;
    let loaded = model.forward(&more, &[(fork, 20)], &mut cache)?;
    assert_eq!(values(&one), values(&other));
    assert_eq!(values(&one), values(&loaded));
    let three = Config { num_hidden_layers: 3, ..config() };
    let mut another = Cache::new(&three, 1, DType::F32, &CPU)?;
    let slot = another.pool_mut().allocate().expect("a slot");
    let error = another.load(slot, &path).expect_err("of another model").to_string();
    assert!(error.contains("layers: 2 elements given, 3"), "{error}");
    std::fs::remove_file(&path).ok();
    Ok(())
}

/// A layer that fails behind others leaves none of them advanced.
#[test]
fn steps_are_whole_or_undone() -> Result<()> {
    let (model, mut cache, slots) = loaded(1)?;
    let step = [(slots[0], 30)];
    model.forward(&ids(&tokens(30, 1))?, &step, &mut cache)?;
    let bytes = |cache: &Cache| {
        let layers = cache.pool().layers().iter();
        layers.map(|layer| layer.to_host().expect("a copy").to_bytes().expect("bytes")).collect()
    };
    let before: Vec<_> = bytes(&cache);
    let failed = cache.step(&step, |layers, _, rope| {
        let [q, k, v] = [4, 2, 2].map(|heads| normal(1, &[1, 30, heads, 32], DType::F32, &CPU));
        let (gate, batch) = (Tensor::zeros(4, DType::F32, &CPU)?, Batch::new().rope(rope));
        let (q, k) = (q?, k?);
        infini_attn_candle::infini_attention(&q, &k, &v?, &gate, &mut layers[0], &batch)?;
        assert_eq!(layers[0].tokens(0), 60);
        // Of the second layer the shape is wrong.
        infini_attn_candle::infini_attention(&q, &k, &q, &gate, &mut layers[1], &batch)
    });
    assert!(failed.expect_err("a wrong shape").to_string().contains("v: shape"));
    assert_eq!(bytes(&cache), before);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (model, mut cache, slots) = loaded(2)?;
    let text = ids(&tokens(10, 1))?;
    let rows = text.reshape((2, 5))?;
    let [a, b] = [slots[0], slots[1]];
    for (tokens, sequences, wanted) in [
        (&text, vec![(a, 4), (b, 5)], "sequences: lengths [4, 5] given, those of tokens [10]"),
        (&text, vec![(a, 10), (b, 0)], "sequences[1]: 0 tokens given, at least 1 expected"),
        (&rows, vec![(a, 5)], "sequences: lengths [5] given, those of tokens [2, 5]"),
        (&rows, vec![(a, 5), (b, 6)], "sequences: lengths [5, 6] given"),
        (&rows, vec![(a, 5), (a, 5)], "slots[1]: 0 given"),
        (&text, vec![], "sequences: none given, at least one expected"),
        (&rows.unsqueeze(0)?, vec![(a, 10)], "tokens: shape [1, 2, 5] given, [total] or [B, T]"),
    ] {
        let error = model.forward(tokens, &sequences, &mut cache).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let gone = cache.pool_mut().allocate().expect_err("full").to_string();
    assert!(gone.contains('2'), "{gone}");
    let mut shallow =
        Cache::new(&Config { num_hidden_layers: 1, ..config() }, 1, DType::F32, &CPU)?;
    let slot = shallow.pool_mut().allocate().expect("a slot");
    let error = model.forward(&text, &[(slot, 10)], &mut shallow).expect_err("too few layers");
    assert!(
        error.to_string().contains("cache: 1 layers given, 2 (the model's) expected"),
        "{error}"
    );
    let other = |change: fn(&mut Config), wanted: &str| -> Result<()> {
        let mut of = config();
        change(&mut of);
        let mut other = Cache::new(&of, 1, DType::F32, &CPU)?;
        let slot = other.pool_mut().allocate().expect("a slot");
        let error = model.forward(&text, &[(slot, 10)], &mut other).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{error}");
        Ok(())
    };
    other(
        |c| c.rope_theta = Some(5e5),
        "cache: one of another rotation given, the model's expected",
    )?;
    let segment = |c: &mut Config| c.infini_attention.as_mut().expect("settings").segment_len = 8;
    other(segment, "state: made for segment_len = 8, the call has segment_len = 16")?;
    let missing = Config { num_hidden_layers: 3, ..config() };
    let error =
        Model::load(&missing, builder(&config(), DType::F32, &CPU)?).expect_err("no weights");
    assert!(error.to_string().contains("model.layers.2."), "{error}");
    let wider = Config { hidden_size: 65, ..config() };
    let error =
        Model::load(&wider, builder(&config(), DType::F32, &CPU)?).expect_err("other shapes");
    assert!(error.to_string().contains("model.embed_tokens.weight"), "{error}");
    Ok(())
}

/// Gates that a checkpoint lacks are new ones only where that was asked for.
#[test]
fn gates_of_models_that_were_never_converted() -> Result<()> {
    let mut weights = weights(&config(), &CPU)?;
    weights.retain(|name, _| !name.ends_with("beta"));
    let vb = || candle_nn::VarBuilder::from_tensors(weights.clone(), DType::BF16, &CPU);
    let error = Model::load(&config(), vb()).expect_err("no gates").to_string();
    assert!(error.contains("model.layers.0.self_attn.beta"), "{error}");
    let settings = infini_attn_candle::Settings { segment_len: 16, ..Default::default() };
    let converted = Config { infini_attention: None, ..config() }.converted(settings);
    let layer = InfiniAttention::load(&converted, vb().pp("model.layers.1.self_attn"))?;
    assert_eq!((values(layer.gate()), layer.gate().dtype()), (vec![-4.0; 4], DType::F32));
    Ok(())
}

/// [B, T, E] and packed [total, E] of a layer alone.
#[test]
fn a_layer_takes_both_shapes() -> Result<()> {
    let config = config();
    let vb = builder(&config, DType::F32, &CPU)?;
    let layer = InfiniAttention::load(&config, vb.pp("model.layers.0.self_attn"))?;
    let x = normal(3, &[2, 25, 64], DType::F32, &CPU)?;
    let rope = config.rope(&CPU)?;
    let state = || State::new(&config.problem(DType::F32)?, 2, true, &CPU);
    let batch = Batch::new().rope(&rope);
    let rows = layer.forward(&x, &batch, &mut state()?)?;
    let packed = x.flatten_to(1)?;
    let packed = layer.forward(&packed, &batch.cu_seqlens(&[0, 25, 50]), &mut state()?)?;
    assert_eq!((rows.dims(), packed.dims()), (&[2, 25, 64][..], &[50, 64][..]));
    assert_close("packed", &values(&packed), &values(&rows), 1e-6);
    let none = layer.forward(&x.narrow(1, 0, 0)?, &batch, &mut state()?)?;
    assert_eq!(none.dims(), [2, 0, 64]);
    let narrow = x.narrow(D::Minus1, 0, 63)?;
    assert!(layer.forward(&narrow, &batch, &mut state()?).is_err());
    Ok(())
}

/// Weights of a model that is trained get the gradients that plain candle computes, through norms, gates
/// and the memory of four segments.
#[test]
fn weights_get_gradients() -> Result<()> {
    let (config, text) = (config(), tokens(75, 4));
    let upstream = normal(3, &[1, config.vocab_size], DType::F32, &CPU)?;
    let gradients = |ours: bool| -> Result<Vec<(String, Vec<f64>)>> {
        let variables = weights(&config, &CPU)?.into_iter();
        let variables = variables.map(|(name, w)| Ok((name, Var::from_tensor(&w)?)));
        let variables = variables.collect::<Result<HashMap<_, _>>>()?;
        let w: HashMap<_, _> =
            variables.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let logits = if ours {
            let model =
                Model::load(&config, candle_nn::VarBuilder::from_tensors(w, DType::F32, &CPU))?;
            let mut cache = Cache::new(&config, 1, DType::F32, &CPU)?;
            let slot = cache.pool_mut().allocate().expect("a slot");
            model.forward(&ids(&text)?, &[(slot, 75)], &mut cache)?
        } else {
            plain(&config, &w, &text)?.narrow(0, 74, 1)?
        };
        let store = (logits * &upstream)?.sum_all()?.backward()?;
        let gradient = |(name, var): (&String, &Var)| {
            Some((name.clone(), values(store.get(var.as_tensor())?)))
        };
        let mut all: Vec<_> = variables.iter().filter_map(gradient).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(all.len(), variables.len(), "every weight has a gradient");
        Ok(all)
    };
    for ((name, got), (_, want)) in gradients(true)?.iter().zip(&gradients(false)?) {
        assert_close(name, got, want, 1e-4);
    }
    Ok(())
}

/// 16-bit weights: the same model, rounded.
#[test]
fn sixteen_bits() -> Result<()> {
    let config = config();
    let logits = |dtype| -> Result<Vec<f64>> {
        let model = Model::load(&config, builder(&config, dtype, &CPU)?)?;
        let mut cache = Cache::new(&config, 1, dtype, &CPU)?;
        let slot = cache.pool_mut().allocate().expect("a slot");
        Ok(values(&model.forward(&ids(&tokens(40, 1))?, &[(slot, 40)], &mut cache)?))
    };
    let expected = logits(DType::F32)?;
    assert_close("f16", &logits(DType::F16)?, &expected, 1e-2);
    assert_close("bf16", &logits(DType::BF16)?, &expected, 6e-2);
    Ok(())
}
