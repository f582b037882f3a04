//! What is read and what is answered.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use infini_attn_candle::{Cache, Model, Slot};
use tokenizers::Tokenizer;

use crate::sampler::Sampler;

/// Tokens, and how long they took.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    pub tokens: usize,
    pub time: Duration,
}

/// One slot of a cache, and the model that goes on in it.
pub struct Conversation<'a> {
    model: &'a Model,
    cache: Cache,
    slot: Slot,
    device: &'a Device,
}

impl<'a> Conversation<'a> {
    pub fn new(model: &'a Model, mut cache: Cache, device: &'a Device) -> Result<Self> {
        let slot = cache.pool_mut().allocate()?;
        Ok(Self { model, cache, slot, device })
    }

    pub fn load(&mut self, path: &Path) -> Result<()> {
        self.cache.load(self.slot, path).with_context(|| {
            format!("--state {}: not a conversation of this model", path.display())
        })
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        let named = || format!("--state {}", path.display());
        self.cache.save(self.slot, path).with_context(named)
    }

    /// Tokens that it has seen.
    pub fn tokens(&self) -> Result<u64> {
        Ok(self.cache.pool().tokens(self.slot)?)
    }

    /// Bytes of its state.
    pub fn bytes(&self) -> usize {
        self.cache.pool().bytes()
    }

    /// Takes tokens in; returns the logits of what comes next, [vocabulary].
    pub fn read(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let sequences = [(self.slot, tokens.len())];
        let tokens = Tensor::new(tokens, self.device)?;
        Ok(self.model.forward(&tokens, &sequences, &mut self.cache)?.squeeze(0)?)
    }

    /// Takes a prompt in, so many tokens at once.
    pub fn read_in(
        &mut self,
        prompt: &[u32],
        chunk: usize,
        mut progress: impl FnMut(usize),
    ) -> Result<(Tensor, Count)> {
        ensure!(!prompt.is_empty(), "--prompt: no text given, at least one token expected");
        let start = Instant::now();
        let mut logits = None;
        for tokens in prompt.chunks(chunk) {
            logits = Some(self.read(tokens)?);
            progress(tokens.len());
        }
        let logits = logits.expect("the prompt is not empty");
        self.device.synchronize()?;
        Ok((logits, Count { tokens: prompt.len(), time: start.elapsed() }))
    }

    /// Draws up to so many tokens and writes their text as they come. Every one of them is taken in, the
    /// last one too, so that whoever goes on finds all of them.
    pub fn answer(
        &mut self,
        mut logits: Tensor,
        most: usize,
        draw: &mut Sampler,
        ends: &[u32],
        text: &mut Text<'_>,
        out: &mut dyn Write,
    ) -> Result<Count> {
        let (start, mut tokens) = (Instant::now(), 0);
        while tokens < most {
            let token = draw.draw(&logits)?;
            logits = self.read(&[token])?;
            tokens += 1;
            if ends.contains(&token) {
                break;
            }
            out.write_all(text.push(token)?.as_bytes())?;
            out.flush()?;
        }
        writeln!(out, "{}", text.rest()?)?;
        self.device.synchronize()?;
        Ok(Count { tokens, time: start.elapsed() })
    }
}

/// More tokens than one character has: what waits longer comes to nothing.
const MOST_WAITING: usize = 16;

/// The text of tokens that come one by one. Characters of several tokens wait for the last of these.
pub struct Text<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the text that was given last, before which nothing changes, and those that wait.
    pub tokens: Vec<u32>,
    waiting: usize,
}

impl<'a> Text<'a> {
    /// Behind the tokens of a prompt, of which the last are enough.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let tokens = prompt[prompt.len().saturating_sub(MOST_WAITING)..].to_vec();
        Self { tokenizer, tokens, waiting: 0 }
    }

    /// One token more: the text that is certain with it.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        self.waiting += 1;
        let text = self.next()?;
        let certain = !text.is_empty() && !text.ends_with(char::REPLACEMENT_CHARACTER);
        match !certain && self.waiting < MOST_WAITING {
            true => Ok(String::new()),
            false => {
                self.tokens.drain(..self.tokens.len() - self.waiting);
                self.waiting = 0;
                Ok(text)
            }
        }
    }

    /// At the end: what waits for tokens that did not come.
    pub fn rest(&mut self) -> Result<String> {
        let text = self.next()?;
        self.waiting = 0;
        Ok(text)
    }

    /// What the waiting tokens add to those before. (Some read differently at a text's beginning.)
    fn next(&self) -> Result<String> {
        let decode = |tokens| self.tokenizer.decode(tokens, true).map_err(|e| anyhow!("{e}"));
        let before = decode(&self.tokens[..self.tokens.len() - self.waiting])?;
        let all = decode(&self.tokens)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_owned())
    }
}
