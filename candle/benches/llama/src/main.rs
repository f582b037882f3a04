//! `Model` beside candle_transformers' Llama with its KV cache, on the CPU, with the same weights:
//! `cargo run --release --manifest-path candle/benches/llama/Cargo.toml -- --bench`.
//!
//! Elements are tokens. A conversation of so many tokens is brought one more, or a chunk of 512;
//! `prompt` reads from the beginning, by chunks of several sizes. Ours goes on and on, its open segment
//! half full at first; theirs is put back before every call, which copies nothing. What a conversation
//! holds, and the most that one call needs besides, are printed (`memory`).
//!
//! Behind 16 K tokens and more theirs makes tensors of more than 32 MiB in every call, which glibc maps anew
//! each time: with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184` in the environment it decodes about
//! five times as fast there.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::llama;
use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use infini_attn_candle::{Cache, Config, Model, Settings, Slot};
use peak_alloc::PeakAlloc;

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const CHUNK: usize = 512;
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const CHANNELS: usize = 64;

fn ours(settings: Settings) -> Config {
    Config {
        model_type: "llama".into(),
        vocab_size: 4096,
        hidden_size: HEADS * CHANNELS,
        intermediate_size: 1408,
        num_hidden_layers: 2,
        num_attention_heads: HEADS,
        num_key_value_heads: Some(KV_HEADS),
        rms_norm_eps: 1e-5,
        ..Config::default()
    }
    .converted(settings)
}

fn theirs(heads: usize) -> llama::Config {
    llama::Config {
        vocab_size: 4096,
        hidden_size: heads * CHANNELS,
        intermediate_size: 1408,
        num_hidden_layers: 2,
        num_attention_heads: heads,
        num_key_value_heads: KV_HEADS,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 1 << 17,
        ..llama::Config::config_7b_v1(false)
    }
}

struct Models {
    config: Config,
    ours: Model,
    theirs: llama::Llama,
    /// Writes keys and values of the same shape into theirs' cache, by a quarter of the query heads:
    /// what they are does not matter to the time.
    filler: llama::Llama,
}

impl Models {
    fn new() -> Result<Self> {
        let (config, weights) = (ours(Settings::default()), VarMap::new());
        let new = |weights| VarBuilder::from_varmap(weights, DType::F32, &Device::Cpu);
        Model::load(&config, new(&weights))?;
        let others = VarMap::new();
        llama::Llama::load(new(&others), &theirs(KV_HEADS))?;
        Ok(Self {
            ours: Model::load(&config, constant(&weights))?,
            config,
            theirs: llama::Llama::load(constant(&weights), &theirs(HEADS))?,
            filler: llama::Llama::load(constant(&others), &theirs(KV_HEADS))?,
        })
    }

    fn our_cache(&self) -> Result<(Cache, Slot)> {
        let mut cache = Cache::new(&self.config, 1, DType::F32, &Device::Cpu)?;
        let slot = cache.pool_mut().allocate()?;
        Ok((cache, slot))
    }

    fn their_cache(&self) -> Result<llama::Cache> {
        Ok(llama::Cache::new(true, DType::F32, &theirs(HEADS), &Device::Cpu)?)
    }

    fn read(&self, (cache, slot): &mut (Cache, Slot), tokens: usize, chunk: usize) -> Result<()> {
        for first in (0..tokens).step_by(chunk) {
            let count = chunk.min(tokens - first);
            self.ours.forward(&some(count)?.squeeze(0)?, &[(*slot, count)], cache)?;
        }
        Ok(())
    }
}

/// Weights that are no variables: of those candle would keep everything that a cache was computed of.
fn constant(weights: &VarMap) -> VarBuilder<'static> {
    let weights = weights.data().lock().expect("nobody panicked");
    let detached = weights.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
    VarBuilder::from_tensors(detached.collect(), DType::F32, &Device::Cpu)
}

/// So many tokens, [1, T].
fn some(tokens: usize) -> Result<Tensor> {
    Ok(Tensor::arange(0, tokens as u32, &Device::Cpu)?.unsqueeze(0)?)
}

/// Theirs read so many tokens behind others.
fn read(
    model: &llama::Llama,
    cache: &mut llama::Cache,
    behind: usize,
    tokens: usize,
    chunk: usize,
) -> Result<()> {
    for first in (0..tokens).step_by(chunk) {
        model.forward(&some(chunk.min(tokens - first))?, behind + first, cache)?;
    }
    Ok(())
}

/// What `make` has made, and what it holds.
fn held<T>(name: &str, make: impl FnOnce() -> Result<T>) -> T {
    let before = PEAK.current_usage();
    let made = make().expect("valid");
    eprintln!("memory: {name} holds {:.1} MiB", mib(PEAK.current_usage() - before));
    made
}

/// The most that a call takes besides.
fn peak<T>(name: &str, call: impl FnOnce() -> Result<T>) {
    PEAK.reset_peak_usage();
    let before = PEAK.current_usage();
    call().expect("valid");
    eprintln!("memory: {name} takes {:.1} MiB more", mib(PEAK.peak_usage() - before));
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

fn bench_behind(c: &mut Criterion, models: &Models, behind: usize) {
    let mut group = c.benchmark_group(format!("behind {behind}"));
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    let (mut ours, mut theirs) = (None, None);
    // criterion calls what it is given for every sample.
    let mut said = HashSet::new();
    for (what, tokens) in [("token", 1), ("chunk", CHUNK)] {
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(format!("{what}, infini-attn"), |b| {
            let cache = ours.get_or_insert_with(|| {
                held(&format!("infini-attn behind {behind}"), || {
                    let mut cache = models.our_cache()?;
                    let half = Settings::default().segment_len / 2;
                    models.read(&mut cache, behind + half, CHUNK).map(|()| cache)
                })
            });
            let mut call = || models.read(cache, tokens, CHUNK);
            if said.insert((what, "ours")) {
                peak(what, &mut call);
            }
            b.iter(|| call().expect("valid"));
        });
        group.bench_function(format!("{what}, candle"), |b| {
            let cache = theirs.get_or_insert_with(|| {
                held(&format!("candle behind {behind}"), || {
                    let mut cache = models.their_cache()?;
                    read(&models.filler, &mut cache, 0, behind, CHUNK).map(|()| cache)
                })
            });
            let call =
                |cache: &mut llama::Cache| read(&models.theirs, cache, behind, tokens, CHUNK);
            if said.insert((what, "theirs")) {
                peak(what, || call(&mut cache.clone()));
            }
            let call = |cache: &mut llama::Cache| call(cache).expect("valid");
            b.iter_batched_ref(|| cache.clone(), call, BatchSize::PerIteration);
        });
    }
}

fn bench_prompt(c: &mut Criterion, models: &Models, tokens: usize) {
    let mut group = c.benchmark_group(format!("prompt of {tokens}"));
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(tokens as u64));
    for chunk in [128, 256, 512, 1024, 2048] {
        group.bench_function(format!("by {chunk}, infini-attn"), |b| {
            let make = || models.our_cache().expect("room");
            let call = |cache: &mut _| models.read(cache, tokens, chunk).expect("valid");
            b.iter_batched_ref(make, call, BatchSize::PerIteration);
        });
        group.bench_function(format!("by {chunk}, candle"), |b| {
            let make = || models.their_cache().expect("room");
            let call = |cache: &mut _| {
                read(&models.theirs, cache, 0, tokens, chunk).expect("valid");
            };
            b.iter_batched_ref(make, call, BatchSize::PerIteration);
        });
    }
}

/// Within the first segment both compute the same.
fn compare(models: &Models) -> Result<()> {
    let (mut cache, slot) = models.our_cache()?;
    let ours = models.ours.forward(&some(300)?, &[(slot, 300)], &mut cache)?;
    let theirs = models.theirs.forward(&some(300)?, 0, &mut models.their_cache()?)?;
    let squares = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
    let error = (squares(&(ours - &theirs)?)? / squares(&theirs)?).sqrt();
    assert!(error < 1e-5, "relative error {error}");
    Ok(())
}

fn all(c: &mut Criterion) {
    let models = Models::new().expect("valid shapes");
    compare(&models).expect("valid");
    for behind in [2048, 4096, 16384, 65536] {
        bench_behind(c, &models, behind);
    }
    bench_prompt(c, &models, 4096);
}

criterion_group!(benches, all);
criterion_main!(benches);
