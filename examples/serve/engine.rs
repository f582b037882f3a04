//! The loop: who is let in, what a step brings, what it gives.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use infini_attn::{Pool, PrefixCache, Slot, State};

use crate::Cli;
use crate::model::{Batch, Model, choose};
use crate::requests::{ANSWERS, Answer, Request};

/// A conversation under way.
struct Conversation {
    slot: Slot,
    request: Request,
    /// Tokens of the prompt that the slot has seen.
    read: usize,
    rank: usize,
    answer: Vec<u8>,
}

/// What was done so far.
#[derive(Default)]
pub struct Counts {
    pub read: usize,
    /// Tokens of prompts that were known.
    pub known: usize,
    pub answered: usize,
    pub most_live: usize,
    pub most_waiting: usize,
    pub steps: Vec<Duration>,
}

pub struct Engine<'a> {
    model: &'a Model,
    pool: Pool<State>,
    prefixes: PrefixCache<usize>,
    chunk: usize,
    pub waiting: VecDeque<Request>,
    live: Vec<Conversation>,
    answers: Vec<Answer>,
    pub counts: Counts,
}

impl<'a> Engine<'a> {
    pub fn new(cli: &Cli, model: &'a Model) -> Result<Self> {
        let slots = cli.slots;
        ensure!(slots >= ANSWERS, "--slots: {slots} given, at least {ANSWERS} expected");
        ensure!(cli.chunk > 0, "--chunk: 0 given, at least 1 expected");
        Ok(Self {
            model,
            pool: Pool::<State>::new(&model.layers(), slots)?,
            prefixes: PrefixCache::new(cli.prefix_cache << 20),
            chunk: cli.chunk,
            waiting: VecDeque::new(),
            live: vec![],
            answers: vec![],
            counts: Counts::default(),
        })
    }

    /// One step of everything that is under way.
    pub fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        self.admit()?;
        self.counts.most_live = self.counts.most_live.max(self.live.len());
        self.counts.most_waiting = self.counts.most_waiting.max(self.waiting.len());
        if self.live.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new();
        let mut sequences = Vec::with_capacity(self.live.len());
        for c in &self.live {
            let tokens = c.next(self.chunk);
            batch.push(tokens);
            sequences.push((c.slot, tokens.len()));
        }
        // Layer by layer; should one fail, all of them stand where they stood.
        let model = self.model;
        let outputs =
            self.pool.step(&sequences, |layers, slots| model.forward(&batch, layers, slots))?;
        self.take(&sequences, &outputs)?;
        self.counts.steps.push(start.elapsed());
        Ok(())
    }

    /// Lets requests in for which there are slots, for each of their answers.
    fn admit(&mut self) -> Result<()> {
        let promised = |c: &Conversation| match c.answer.is_empty() {
            true => c.request.answers - 1,
            false => 0,
        };
        let promised: usize = self.live.iter().map(promised).sum();
        let mut free = self.pool.available() - promised;
        while let Some(request) = self.waiting.front()
            && request.answers <= free
            && let Some(request) = self.waiting.pop_front()
        {
            free -= request.answers;
            let (slot, mut read) = (self.pool.allocate()?, 0);
            if request.prefix > 0
                && let Some(known) = self.prefixes.get(&request.kind)
            {
                self.pool.restore(&[slot], known)?;
                read = request.prefix;
                self.counts.known += read;
            }
            self.live.push(Conversation { slot, request, read, rank: 0, answer: vec![] });
        }
        Ok(())
    }

    /// What the step has given: prompts are further, answers longer, some at their end.
    fn take(&mut self, sequences: &[(Slot, usize)], outputs: &[Vec<f32>]) -> Result<()> {
        let mut forked = vec![];
        for ((c, &(slot, count)), output) in self.live.iter_mut().zip(sequences).zip(outputs) {
            if c.read < c.request.prompt.len() {
                c.read += count;
                self.counts.read += count;
                if c.read == c.request.prefix {
                    self.prefixes.insert(c.request.kind, self.pool.snapshot(&[slot])?);
                }
                if c.read < c.request.prompt.len() {
                    continue;
                }
                // The other answers go on from the same prompt.
                for rank in 1..c.request.answers {
                    let fork = self.pool.fork(slot)?;
                    forked.push(c.continued(fork, rank, choose(output, rank)));
                }
            }
            c.answer.push(choose(output, 0));
            self.counts.answered += 1;
        }
        self.counts.answered += forked.len();
        self.live.extend(forked);
        let (done, live): (Vec<_>, Vec<_>) =
            self.live.drain(..).partition(|c| c.answer.len() == c.request.answer);
        self.live = live;
        for c in done {
            self.pool.free(c.slot)?;
            let (prompt, rank) = (c.request.prompt, c.rank);
            self.answers.push(Answer { prompt, rank, tokens: c.answer });
        }
        Ok(())
    }

    pub fn pool(&self) -> &Pool<State> {
        &self.pool
    }

    pub fn prefixes(&self) -> &PrefixCache<usize> {
        &self.prefixes
    }

    pub fn live(&self) -> usize {
        self.live.len()
    }

    pub fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Requests of which an answer is there.
    pub fn answered(&self) -> usize {
        self.answers.iter().filter(|answer| answer.rank == 0).count()
    }

    pub fn is_idle(&self) -> bool {
        self.live.is_empty() && self.waiting.is_empty()
    }
}

impl Conversation {
    /// Its tokens of the next step: a part of the prompt, up to where what others share ends, or the
    /// token chosen last.
    fn next(&self, chunk: usize) -> &[u8] {
        let (prompt, prefix) = (&self.request.prompt, self.request.prefix);
        if self.read == prompt.len() {
            return &self.answer[self.answer.len() - 1..];
        }
        let end = if self.read < prefix { prefix } else { prompt.len() };
        &prompt[self.read..end.min(self.read + chunk)]
    }

    /// Another answer to its prompt.
    fn continued(&self, slot: Slot, rank: usize, first: u8) -> Self {
        let Request { ref prompt, kind, prefix, answer, .. } = self.request;
        let request = Request { prompt: prompt.clone(), kind, prefix, answer, answers: 1 };
        Self { slot, request, read: self.read, rank, answer: vec![first] }
    }
}
