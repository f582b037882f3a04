use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarMap};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;

use super::*;

/// The answer and the notes of a command line, or its error with all causes.
fn generate(arguments: &[&str]) -> Result<(String, String), String> {
    let mut out = vec![];
    let notes = generate_into(arguments, &mut out)?;
    Ok((String::from_utf8(out).expect("text"), notes))
}

fn generate_into(arguments: &[&str], out: &mut dyn Write) -> Result<String, String> {
    let cli =
        Cli::try_parse_from(["generate"].iter().chain(arguments)).map_err(|e| e.to_string())?;
    let mut notes = vec![];
    run(&cli, out, &mut notes).map_err(|e| format!("{e:#}"))?;
    Ok(String::from_utf8(notes).expect("text"))
}

#[test]
fn a_seed_gives_an_answer() {
    let answer = |seed| generate(&["--demo", "--tokens", "40", "--seed", seed]).unwrap().0;
    assert_eq!(answer("1"), answer("1"));
    assert_ne!(answer("1"), answer("2"));
    assert_eq!(answer("1").trim_end_matches('\n').len(), 40);
    assert!(answer("1").trim_end_matches('\n').chars().all(|c| c.is_ascii_graphic() || c == ' '));
    let state = |more: &[&str]| {
        let (_, notes) = generate(&[&["--demo", "--tokens", "1"], more].concat()).unwrap();
        notes.lines().last().map(str::to_owned)
    };
    assert_eq!(state(&[]), state(&["--segment-len", "256", "--gate", "0"]));
    assert_ne!(state(&[]), state(&["--segment-len", "2048"]));
    let greedy = |seed| {
        let rest = ["--temperature", "0", "--seed", seed];
        generate(&[&["--demo", "--tokens", "40"][..], &rest].concat()).unwrap().0
    };
    assert_eq!(greedy("1"), greedy("2"));
}

/// Across the ends of segments, whatever the chunks, and with a prompt in a file.
#[test]
fn two_runs_with_a_state_are_one() {
    let folder = TempDir::new().unwrap();
    let [state, text] = ["state", "text"].map(|name| folder.path().join(name));
    let demo = ["--demo", "--temperature", "0", "--segment-len", "16", "--tokens", "50"];
    let [state, text] = [&state, &text].map(|path| path.to_str().unwrap());
    let with = |more: &[&str]| generate(&[&demo[..], more].concat()).unwrap();

    let (first, _) = with(&["--state", state, "--prompt", "A stream"]);
    let (second, notes) = with(&["--state", state, "--prompt", " goes on", "--chunk", "3"]);
    fs::write(text, format!("A stream{} goes on", &first[..50])).unwrap();
    assert_eq!(with(&["--prompt-file", text]).0, second);
    for wanted in ["state: 58 tokens", "prompt  8 tokens", "answer  50 tokens", "after 116 tokens"]
    {
        assert!(notes.contains(wanted), "{wanted}: {notes}");
    }
}

#[test]
fn a_run_that_fails_saves_nothing() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let folder = TempDir::new().unwrap();
    let state = folder.path().join("state");
    let arguments = ["--demo", "--tokens", "3", "--state", state.to_str().unwrap()];
    generate_into(&arguments, &mut Full).unwrap_err();
    assert!(!state.exists());
    generate(&arguments).unwrap();
    let before = fs::read(&state).unwrap();
    generate_into(&arguments, &mut Full).unwrap_err();
    assert!(fs::read(&state).unwrap() == before);
}

#[test]
fn streamed_text_is_the_text_of_all_tokens() {
    let tokenizer = with_end();
    for text in ["Größe: 3 €, 😀", "é", "", "plain", "<end>a<end>"] {
        let whole = tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
        // Cut anywhere, also inside of a character.
        for tokens in (0..=whole.len()).map(|end| &whole[..end]) {
            let mut stream = Text::new(&tokenizer, &[]);
            let mut streamed = String::new();
            for &token in tokens {
                streamed += &stream.push(token).unwrap();
                assert!(!streamed.contains(char::REPLACEMENT_CHARACTER), "{streamed}");
                assert!(stream.tokens.len() <= 8, "tokens pile up");
            }
            streamed += &stream.rest().unwrap();
            assert_eq!(streamed, tokenizer.decode(tokens, true).unwrap());
        }
    }
}

/// A tokenizer whose words begin with spaces, but for a text's first one.
#[test]
fn an_answer_goes_on_behind_its_prompt() {
    let words = [("▁a".into(), 0), ("▁b".into(), 1)].into_iter().collect();
    let mut tokenizer = Tokenizer::new(BPE::new(words, vec![]));
    tokenizer.with_decoder(Some(Metaspace::new('▁', PrependScheme::Always, false)));
    assert_eq!(Text::new(&tokenizer, &[0]).push(1).unwrap(), " b");
    assert_eq!(Text::new(&tokenizer, &[]).push(1).unwrap(), "b");
}

/// Bytes that are no text, or tokens that show nothing, do not pile up.
#[test]
fn what_never_becomes_text_is_let_go() {
    let tokenizer = with_end();
    let byte = tokenizer.encode_fast("é", false).unwrap().get_ids()[0];
    let mut stream = Text::new(&tokenizer, &[]);
    let pushed: String = [byte; 40].iter().map(|&token| stream.push(token).unwrap()).collect();
    assert_eq!(pushed.chars().count(), 32);
    let mut stream = Text::new(&tokenizer, &[]);
    assert!((0..40).all(|_| stream.push(256).unwrap().is_empty()));
    assert_eq!(stream.push(byte).unwrap() + &stream.rest().unwrap(), "\u{fffd}");
}

#[test]
fn only_the_beginning_is_marked() {
    let tokenizer = marking();
    let tokens = |fresh| tokens(&tokenizer, "a", fresh, 257).unwrap();
    let plain = tokens(false);
    assert_eq!((plain.len(), tokens(true)), (1, [vec![256], plain].concat()));

    let (saved, folder) = (Saved::new(true), TempDir::new().unwrap());
    tokenizer.save(saved.0.path().join("tokenizer.json"), false).unwrap();
    let state = folder.path().join("state");
    let state = ["--state", state.to_str().unwrap()];
    for prompt in ["prompt  2 tokens", "prompt  1 tokens"] {
        let run = [&[saved.path(), "--prompt", "a", "--tokens", "3"][..], &state].concat();
        let (_, notes) = generate(&run).unwrap();
        assert!(notes.contains(prompt), "{prompt}: {notes}");
    }
}

/// A tokenizer that puts a token before a text.
fn marking() -> Tokenizer {
    let mut tokenizer = with_end();
    let marked = TemplateProcessing::builder()
        .try_single("<end> $A")
        .unwrap()
        .special_tokens(vec![("<end>", 256)])
        .build();
    tokenizer.with_post_processor(Some(marked.unwrap()));
    tokenizer
}

#[test]
fn memory_stays_what_it_was() {
    let Checkpoint { config, weights, .. } = demo::checkpoint();
    let (device, config) = (Device::Cpu, config.converted(Settings::default()));
    let weights = VarBuilder::from_backend(weights, DType::F32, device.clone());
    let model = Model::load(&config, weights).unwrap();
    let cache = Cache::new(&config, 1, DType::F32, &device).unwrap();
    let mut conversation = Conversation::new(&model, cache, &device).unwrap();
    conversation.read(&[1]).unwrap();
    let bytes = conversation.bytes();
    conversation.read_in(&[2; 5000], 512, |_| ()).unwrap();
    assert_eq!((conversation.tokens().unwrap(), conversation.bytes()), (5001, bytes));
}

#[test]
fn checkpoints_generate() {
    let (one, shards, plain) = (Saved::new(true), Saved::new(true), Saved::new(false));
    shards.split();
    let answer = |saved: &Saved, more: &[&str]| {
        let common = [saved.path(), "--prompt", "Größe", "--tokens", "60", "--temperature", "0"];
        generate(&[&common[..], more].concat()).unwrap()
    };
    let (text, notes) = answer(&one, &[]);
    assert_eq!(text.len(), 61, "{text}");
    assert!(!notes.contains("never converted"), "{notes}");
    assert_eq!(answer(&shards, &[]).0, text);
    let (converted, notes) = answer(&plain, &["--segment-len", "32", "--gate", "-1"]);
    assert_eq!(converted, text);
    assert!(notes.contains("never converted"), "{notes}");
    // An open gate makes another model of it, bf16 nearly the same.
    assert_ne!(answer(&plain, &["--segment-len", "32", "--gate", "inf"]).0, text);
    assert_eq!(answer(&one, &["--dtype", "bf16"]).0.len(), 61);
}

#[test]
fn tokens_of_the_configuration_end_an_answer() {
    let saved = Saved::new(true);
    let answered = || generate(&[saved.path(), "--prompt", "a", "--tokens", "5"]).unwrap();
    let every: Vec<u32> = (0..VOCABULARY).collect();
    saved.edit("config.json", |config| config["eos_token_id"] = json!(every));
    let (text, notes) = answered();
    assert_eq!(text, "\n");
    assert!(notes.contains("answer  1 tokens") && notes.contains("after 2 tokens"), "{notes}");
    saved.write("generation_config.json", &json!({ "eos_token_id": VOCABULARY - 1 }));
    assert!(answered().1.contains("answer  5 tokens"));
}

#[test]
fn what_is_wrong_is_said() {
    let saved = Saved::new(true);
    let refused = |more: &[&str], wanted: &str| {
        let folder: &[_] = if more.contains(&"--demo") { &[] } else { &[saved.path()] };
        let error = generate(&[folder, more].concat()).expect_err(wanted);
        assert!(error.contains(wanted), "{wanted}: {error}");
    };
    refused(&["--demo", "--chunk", "0"], "--chunk: 0 given, at least 1 expected");
    refused(&["--demo", "--temperature=-1"], "a number >= 0 expected");
    refused(&["--demo", "--top-p", "0"], "a number > 0 and <= 1 expected");
    refused(&["--demo", "--gate", "nan"], "a number expected");
    refused(&["--demo", "--segment-len", "0"], "segment_len: 0 given");
    refused(&["--demo", "--device", "cuda:x"], "cpu, cuda or cuda:N expected");
    refused(&["--demo", "--prompt", ""], "--prompt: no text given, at least one token expected");
    refused(&["--demo", "--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: ");
    refused(&["--demo", "--state", "no/folder/x"], "there is no folder ");
    let wanted = "infini_attention";
    saved.edit("config.json", |config| config[wanted]["update"] = json!("hebb"));
    refused(&["--prompt", "a"], "hebb");
    saved.edit("config.json", |config| config[wanted]["update"] = json!("delta"));
    refused(&["--update", "linear"], "--update: given, but config.json has the settings");
    #[cfg(not(feature = "cuda"))]
    refused(&["--demo", "--device", "cuda"], "--device: cuda given, but this was built without");
    assert!(generate(&[]).expect_err("no folder").contains("FOLDER"));
}

#[test]
fn what_is_wrong_with_a_checkpoint_is_said() {
    let saved = Saved::new(true);
    let refused = |wanted: &[&str]| {
        let error = generate(&[saved.path(), "--prompt", "a<end>"]).expect_err(wanted[0]);
        assert!(wanted.iter().all(|wanted| error.contains(wanted)), "{wanted:?}: {error}");
    };
    let norm = "model.layers.1.input_layernorm.weight";
    saved.edit("config.json", |config| config["vocab_size"] = json!(256));
    refused(&[
        "model.embed_tokens.weight: shape [257, 64] given in ",
        "model.safetensors, [256, 64] expected (by config.json)",
    ]);
    saved.edit("config.json", |config| config["vocab_size"] = json!(VOCABULARY));
    saved.edit_weights(|weights| drop(weights.remove(norm)));
    refused(&[&format!("{}: no tensor {norm}", saved.path())]);
    saved.edit_weights(|weights| {
        let norm = weights["model.norm.weight"].clone();
        weights.insert("model.layers.1.input_layernorm.weight".into(), norm);
        let first = weights["lm_head.weight"].narrow(0, 0, 256).unwrap();
        weights.insert("lm_head.weight".into(), first);
        let first = weights["model.embed_tokens.weight"].narrow(0, 0, 256).unwrap();
        weights.insert("model.embed_tokens.weight".into(), first);
    });
    saved.edit("config.json", |config| config["vocab_size"] = json!(256));
    refused(&[
        "tokenizer.json: token 256 given, less than 256 expected (vocab_size of config.json)",
    ]);
    saved.write("generation_config.json", &json!({ "eos_token_id": "x" }));
    refused(&["generation_config.json: "]);
    saved.write("model.safetensors.index.json", &json!({ "weight_map": { norm: "other" } }));
    fs::remove_file(saved.0.path().join("generation_config.json")).unwrap();
    refused(&["other: "]);
    saved.write("model.safetensors.index.json", &json!({}));
    refused(&["model.safetensors.index.json: ", "weight_map"]);
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        let _ = fs::remove_file(saved.0.path().join("model.safetensors.index.json"));
        fs::write(saved.0.path().join(file), "nonsense").unwrap();
        refused(&[file]);
        fs::remove_file(saved.0.path().join(file)).unwrap();
        refused(&[&format!("{file}: "), "No such file"]);
    }
}

#[test]
fn conversations_of_other_models_are_refused() {
    let folder = TempDir::new().unwrap();
    let state = folder.path().join("state");
    let path = state.to_str().unwrap();
    let demo = ["--demo", "--tokens", "1", "--state", path];
    generate(&demo).unwrap();
    let refused = |more: &[&str], wanted: &str| {
        let error = generate(&[&demo[..], more].concat()).expect_err(wanted);
        let of = format!("--state {path}: not a conversation of this model: ");
        assert!(error.contains(&of) && error.contains(wanted), "{wanted}: {error}");
    };
    refused(&["--segment-len", "100"], "segment_len");
    refused(&["--dtype", "bf16"], "dtype");
    fs::write(&state, "no state").unwrap();
    refused(&[], "state");
    assert_eq!(fs::read(&state).unwrap(), b"no state");
}

/// Bytes and a token that no text shows.
fn with_end() -> Tokenizer {
    let mut tokenizer = demo::tokenizer();
    tokenizer.add_special_tokens([AddedToken::from("<end>", true)]).unwrap();
    tokenizer
}

const VOCABULARY: u32 = 257;

/// A small checkpoint in a folder of its own.
struct Saved(TempDir);

impl Saved {
    fn new(converted: bool) -> Self {
        let saved = Self(TempDir::new().unwrap());
        let mut config = json!({
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "infini_attention":
                { "segment_len": 32, "update": "delta", "empty_memory": "bypass", "gate": -1.0 },
        });
        saved.write("config.json", &config);
        let mut weights = weights(&saved.0.path().join("config.json"));
        if !converted {
            config["infini_attention"].take();
            saved.write("config.json", &config);
            weights.retain(|name, _| !name.ends_with("beta"));
        }
        candle_core::safetensors::save(&weights, saved.weights()).unwrap();
        with_end().save(saved.0.path().join("tokenizer.json"), false).unwrap();
        saved
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn weights(&self) -> std::path::PathBuf {
        self.0.path().join("model.safetensors")
    }

    fn write(&self, name: &str, value: &Value) {
        fs::write(self.0.path().join(name), value.to_string()).unwrap();
    }

    fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let text = fs::read(self.0.path().join(name)).unwrap();
        let mut value = serde_json::from_slice(&text).unwrap();
        change(&mut value);
        self.write(name, &value);
    }

    fn edit_weights(&self, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let mut weights = candle_core::safetensors::load(self.weights(), &Device::Cpu).unwrap();
        change(&mut weights);
        candle_core::safetensors::save(&weights, self.weights()).unwrap();
    }

    /// Into two files and their index.
    fn split(&self) {
        let weights = candle_core::safetensors::load(self.weights(), &Device::Cpu).unwrap();
        let file =
            |name: &str| format!("model-{}.safetensors", usize::from(name.contains("layers.1")));
        let map: HashMap<_, _> = weights.keys().map(|name| (name, file(name))).collect();
        self.write("model.safetensors.index.json", &json!({ "weight_map": map }));
        for which in ["model-0.safetensors", "model-1.safetensors"] {
            let part = weights.iter().filter(|(name, _)| file(name) == which);
            let part: HashMap<_, _> =
                part.map(|(name, tensor)| (&name[..], tensor.clone())).collect();
            candle_core::safetensors::save(&part, self.0.path().join(which)).unwrap();
        }
        fs::remove_file(self.weights()).unwrap();
    }
}

/// Weights of a configuration, those that the demonstration would have of their shapes.
fn weights(config: &Path) -> HashMap<String, Tensor> {
    let config = Config::from_file(config).unwrap();
    let shapes = VarMap::new();
    Model::load(&config, VarBuilder::from_varmap(&shapes, DType::F32, &Device::Cpu)).unwrap();
    let mut shapes: Vec<_> = shapes.data().lock().unwrap().clone().into_iter().collect();
    shapes.sort_by(|(a, _), (b, _)| a.cmp(b));
    let drawn = demo::checkpoint().weights;
    let draw = |(name, var): (String, candle_core::Var)| {
        let init = match var.rank() {
            1 => Init::Const(if name.ends_with("beta") { -1.0 } else { 1.0 }),
            _ => candle_nn::init::DEFAULT_KAIMING_NORMAL,
        };
        let tensor = drawn.get(var.shape().clone(), &name, init, DType::F32, &Device::Cpu);
        (name, tensor.unwrap())
    };
    shapes.into_iter().map(draw).collect()
}
