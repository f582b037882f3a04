//! Who comes when, and wants what.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::Cli;

/// Kinds of prompts, by what they begin with.
const KINDS: usize = 4;

/// Most answers to one prompt.
pub const ANSWERS: usize = 2;

/// A request that has come.
pub struct Request {
    pub prompt: Vec<u8>,
    /// Which of the known beginnings the prompt has, and its length.
    pub kind: usize,
    pub prefix: usize,
    /// Tokens of an answer.
    pub answer: usize,
    /// How many are wanted: they begin differently.
    pub answers: usize,
}

/// An answer that was given.
pub struct Answer {
    pub prompt: Vec<u8>,
    /// Place of its first token among the candidates.
    pub rank: usize,
    pub tokens: Vec<u8>,
}

/// Requests to come.
pub struct Requests {
    rng: StdRng,
    kinds: Vec<Vec<u8>>,
    left: usize,
    rate: f64,
    prompt: usize,
    answer: usize,
}

impl Requests {
    pub fn new(cli: &Cli) -> Result<Self> {
        ensure!(cli.rate > 0.0, "--rate: {} given, a positive number expected", cli.rate);
        ensure!(cli.prompt > 0, "--prompt: 0 given, at least 1 expected");
        ensure!(cli.answer > 0, "--answer: 0 given, at least 1 expected");
        let mut rng = StdRng::seed_from_u64(cli.seed + 1);
        let kinds = (0..KINDS).map(|_| tokens(&mut rng, cli.prefix)).collect();
        let (left, rate) = (cli.requests, cli.rate);
        Ok(Self { rng, kinds, left, rate, prompt: cli.prompt, answer: cli.answer })
    }

    /// Whether more will come.
    pub fn open(&self) -> bool {
        self.left > 0
    }

    /// Those of one step: so many that `rate` come on average.
    pub fn arrive(&mut self, waiting: &mut VecDeque<Request>) {
        let mut expected = self.rate;
        while self.left > 0 && self.rng.random::<f64>() < expected {
            expected -= 1.0;
            self.left -= 1;
            let kind = self.rng.random_range(0..KINDS);
            let own = self.rng.random_range(1..=self.prompt);
            let prompt = [&self.kinds[kind][..], &tokens(&mut self.rng, own)].concat();
            waiting.push_back(Request {
                prefix: self.kinds[kind].len(),
                prompt,
                kind,
                answer: self.rng.random_range(1..=self.answer),
                answers: self.rng.random_range(1..=ANSWERS),
            });
        }
    }
}

fn tokens(rng: &mut StdRng, count: usize) -> Vec<u8> {
    (0..count).map(|_| rng.random()).collect()
}
