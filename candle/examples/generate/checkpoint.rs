//! What a model is made of: configuration, tokenizer, weights.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use candle_core::safetensors::{Load, MmapedSafetensors};
use candle_core::{DType, Device, Error, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use infini_attn_candle::{Config, EndTokens};
use serde::Deserialize;
use tokenizers::Tokenizer;

pub struct Checkpoint {
    pub config: Config,
    pub tokenizer: Tokenizer,
    pub weights: Box<dyn SimpleBackend>,
    /// Tokens that end an answer.
    pub ends: Vec<u32>,
}

impl Checkpoint {
    /// Of a folder as Hugging Face's `save_pretrained` writes it.
    pub fn open(folder: &Path) -> Result<Self> {
        let config = Config::from_file(folder.join("config.json"))?;
        let path = folder.join("tokenizer.json");
        let tokenizer =
            Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let ends = end_tokens(folder)?.unwrap_or_else(|| config.end_tokens().to_vec());
        Ok(Self { config, tokenizer, weights: Box::new(Weights::open(folder)?), ends })
    }
}

/// Those of `generation_config.json`, which come before those of the configuration.
fn end_tokens(folder: &Path) -> Result<Option<Vec<u32>>> {
    #[derive(Deserialize)]
    struct Generation {
        eos_token_id: Option<EndTokens>,
    }
    let path = folder.join("generation_config.json");
    if !path.exists() {
        return Ok(None);
    }
    let generation: Generation = json(&path)?;
    Ok(generation.eos_token_id.map(|ends| match ends {
        EndTokens::One(token) => vec![token],
        EndTokens::Several(tokens) => tokens,
    }))
}

fn json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

/// Weights in files, which are mapped; each is read when the model asks for it.
struct Weights {
    folder: PathBuf,
    files: Vec<(PathBuf, MmapedSafetensors)>,
    /// In which of the files.
    places: HashMap<String, usize>,
}

impl Weights {
    fn open(folder: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let index = folder.join("model.safetensors.index.json");
        let names = match index.exists() {
            true => json::<Index>(&index)?.weight_map.into_values().collect(),
            false => BTreeSet::from(["model.safetensors".to_owned()]),
        };
        let (mut files, mut places) = (vec![], HashMap::new());
        for name in names {
            let path = folder.join(name);
            // SAFETY: a checkpoint is not written to while a model is loaded from it, which is all that
            // anyone can say of a file that is mapped.
            let file = unsafe { MmapedSafetensors::new(&path) }
                .with_context(|| path.display().to_string())?;
            places.extend(file.tensors().into_iter().map(|(name, _)| (name, files.len())));
            files.push((path, file));
        }
        Ok(Self { folder: folder.into(), files, places })
    }

    fn file(&self, name: &str) -> candle_core::Result<&(PathBuf, MmapedSafetensors)> {
        let missing = || Error::msg(format!("{}: no tensor {name}", self.folder.display()));
        self.places.get(name).map(|&i| &self.files[i]).ok_or_else(missing)
    }
}

impl SimpleBackend for Weights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let (path, file) = self.file(name)?;
        let found = file.get(name)?;
        if found.shape() != shape.dims() {
            let (found, path) = (found.shape(), path.display());
            let expected = shape.dims();
            return Err(Error::msg(format!(
                "{name}: shape {found:?} given in {path}, {expected:?} expected (by config.json)"
            )));
        }
        found.load(device)?.to_dtype(dtype)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.file(name)?.1.load(name, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }
}
