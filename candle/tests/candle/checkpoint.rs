//! Models that the Python package has converted and saved (tests/golden/make.py) compute what it computes.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use infini_attn_candle::{Cache, Config, Model};

use crate::common::metric::assert_close;
use crate::common::random::values;

const CPU: Device = Device::Cpu;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn agrees(name: &str) -> Result<()> {
    agrees_by(name, &folder(name).join("config.json"))
}

fn agrees_by(name: &str, config: &Path) -> Result<()> {
    let (folder, config) = (folder(name), Config::from_file(config)?);
    let weights = std::fs::read(folder.join("model.safetensors"))?;
    let model =
        Model::load(&config, VarBuilder::from_buffered_safetensors(weights, DType::F32, &CPU)?)?;
    let expected = candle_core::safetensors::load(folder.join("expected.safetensors"), &CPU)?;
    let (tokens, logits) = (&expected["tokens"], &expected["logits"]);
    let count = tokens.dim(0)?;

    let mut cache = Cache::new(&config, 2, DType::F32, &CPU)?;
    let [whole, single] = [(); 2].map(|()| cache.pool_mut().allocate().expect("a slot"));
    let last = model.forward(tokens, &[(whole, count)], &mut cache)?;
    assert_close("the last token", &values(&last), &values(&logits.get(count - 1)?), 1e-5);
    let each =
        (0..count).map(|t| model.forward(&tokens.narrow(0, t, 1)?, &[(single, 1)], &mut cache));
    let each = Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?;
    assert_close("each token", &values(&each), &values(logits), 1e-5);
    Ok(())
}

#[test]
fn llama() -> Result<()> {
    agrees("llama")
}

#[test]
fn mistral() -> Result<()> {
    agrees("mistral")
}

#[test]
fn qwen2() -> Result<()> {
    agrees("qwen2")
}

#[test]
fn qwen3() -> Result<()> {
    agrees("qwen3")
}

/// The configuration of a model, changed, in a file.
fn changed(name: &str, change: impl FnOnce(&mut serde_json::Value)) -> tempfile::NamedTempFile {
    let text = std::fs::read(folder(name).join("config.json")).expect("a file");
    let mut value = serde_json::from_slice(&text).expect("JSON");
    change(&mut value);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), value.to_string()).expect("written");
    file
}

/// As transformers 4 writes a rotation, and as 5 writes again what 4 had written.
#[test]
fn older_configurations() -> Result<()> {
    for name in ["llama", "qwen2"] {
        let old = changed(name, |config| {
            let mut rope = config["rope_parameters"].take();
            config["rope_theta"] = rope["rope_theta"].take();
            rope["type"] = rope["rope_type"].clone();
            config["rope_scaling"] = rope;
        });
        agrees_by(name, old.path())?;
        let oldest = changed(name, |config| {
            let mut rope = config["rope_parameters"].take();
            config["rope_theta"] = rope["rope_theta"].take();
            rope["type"] = rope["rope_type"].take();
            config["rope_scaling"] = rope;
        });
        agrees_by(name, oldest.path())?;
    }
    Ok(())
}

/// What decides nothing, or is the default.
#[test]
fn what_files_hold_besides() -> Result<()> {
    let file = changed("qwen2", |config| {
        config["attention_bias"] = true.into();
        config["mlp_bias"] = true.into();
        config["sliding_window"] = 4096.into();
        config["use_sliding_window"] = false.into();
        config["hidden_act"] = "swish".into();
        config["eos_token_id"] = vec![3, 4].into();
        config.as_object_mut().expect("an object").remove("rms_norm_eps");
    });
    agrees_by("qwen2", file.path())?;
    assert_eq!(Config::from_file(file.path())?.end_tokens(), [3, 4]);
    let closed = changed("llama", |config| {
        config["infini_attention"]["gate"] = serde_json::json!({ "__float__": "-Infinity" });
        config["eos_token_id"] = 7.into();
    });
    let config = Config::from_file(closed.path())?;
    assert_eq!((config.settings()?.gate, config.end_tokens()), (f64::NEG_INFINITY, &[7][..]));
    Ok(())
}
