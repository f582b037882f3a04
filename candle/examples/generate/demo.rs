//! A model without files: random weights, and tokens that are bytes.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use infini_attn_candle::{Config, Settings};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};
use tokenizers::Tokenizer;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::checkpoint::Checkpoint;

/// The same for everybody, so that conversations in files stay its own.
const SEED: u64 = 2404;

pub fn checkpoint() -> Checkpoint {
    let config = Config {
        model_type: "llama".into(),
        vocab_size: 256,
        hidden_size: 128,
        intermediate_size: 256,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        rms_norm_eps: 1e-5,
        infini_attention: Some(Settings { segment_len: 256, gate: 0.0, ..Settings::default() }),
        ..Config::default()
    };
    let weights = Box::new(Drawn(Mutex::new(StdRng::seed_from_u64(SEED))));
    Checkpoint { config, tokenizer: tokenizer(), weights, ends: vec![] }
}

/// Every byte a token.
pub fn tokenizer() -> Tokenizer {
    let vocabulary = (0..).zip(alphabet()).map(|(i, c)| (c.into(), i)).collect();
    let mut tokenizer = Tokenizer::new(BPE::new(vocabulary, vec![]));
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer
}

/// The characters that stand for bytes, by token.
fn alphabet() -> Vec<char> {
    let mut alphabet: Vec<_> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    alphabet
}

/// Weights by a generator, in the order in which the model asks for them.
struct Drawn(Mutex<StdRng>);

impl SimpleBackend for Drawn {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        if let Init::Const(value) = init {
            return Tensor::full(value as f32, shape, device)?.to_dtype(dtype);
        }
        let width = shape.dims().last().copied().unwrap_or(1);
        let scale = if name.contains("embed") { 1.0 } else { (width as f32).powf(-0.5) };
        let mut rng = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let normal = StandardNormal.sample_iter(&mut *rng).map(|x: f32| scale * x);
        let mut values: Vec<f32> = normal.take(shape.elem_count()).collect();
        // The first channel is 4 everywhere, by which the head keeps bytes that no terminal should see
        // out of the answer.
        let rows = values.chunks_mut(width).zip(alphabet());
        match name {
            "model.embed_tokens.weight" => rows.for_each(|(row, _)| row[0] = 4.0),
            "lm_head.weight" => rows.for_each(|(row, c)| {
                row[0] = if c.is_ascii_graphic() || c == 'Ġ' { 0.0 } else { -30.0 };
            }),
            _ => {}
        }
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        Err(candle_core::Error::msg(format!("{name}: a shape is needed")))
    }

    /// Gates alone are not drawn: they begin at the settings'.
    fn contains_tensor(&self, name: &str) -> bool {
        !name.ends_with("beta")
    }
}
