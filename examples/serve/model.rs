//! A model of random tables: what a token's query, key and value are depends on its layer and, for
//! queries, on what the layer below has put out.

use anyhow::{Result, ensure};
use infini_attn::{Inputs, Outputs, Problem, Rope, State, TensorView, TensorViewMut, forward};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::Cli;
use crate::requests::Answer;

/// Tokens that there are.
pub const VOCABULARY: usize = 256;

pub struct Model {
    pub problem: Problem,
    layers: Vec<Layer>,
    /// Rotation, [positions, D / 2].
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Rows per token.
struct Layer {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
}

/// The tokens of one step, sequence after sequence.
#[derive(Default)]
pub struct Batch {
    pub tokens: Vec<u8>,
    /// Where each sequence begins, and the end.
    pub cu_seqlens: Vec<i32>,
}

impl Batch {
    pub fn new() -> Self {
        Self { tokens: vec![], cu_seqlens: vec![0] }
    }

    pub fn push(&mut self, tokens: &[u8]) {
        self.tokens.extend_from_slice(tokens);
        self.cu_seqlens.push(self.tokens.len() as i32);
    }
}

impl Model {
    pub fn new(cli: &Cli) -> Result<Self> {
        let width = cli.heads * cli.dim;
        ensure!(
            width >= VOCABULARY,
            "--heads, --dim: {width} channels given, at least {VOCABULARY} expected, one per token"
        );
        let even = cli.dim >= 2 && cli.dim.is_multiple_of(2);
        ensure!(
            even,
            "--dim: {} given, an even number expected: channels are rotated in pairs",
            cli.dim
        );
        let problem = Problem::builder()
            .heads(cli.heads)
            .kv_heads(cli.kv_heads)
            .head_dim(cli.dim)
            .segment_len(cli.segment)
            .build()?;
        let mut rng = StdRng::seed_from_u64(cli.seed);
        let mut table = |heads: usize| -> Vec<f32> {
            (0..VOCABULARY * heads * cli.dim).map(|_| rng.random_range(-1.0..1.0)).collect()
        };
        let layers = (0..cli.layers).map(|_| Layer {
            q: table(cli.heads),
            k: table(cli.kv_heads),
            v: table(cli.kv_heads),
            gate: vec![-1.0; cli.heads],
        });
        let layers = layers.collect();
        let positions = cli.prefix + cli.prompt + cli.answer;
        let angle = |i: usize| {
            let (position, pair) = (i / (cli.dim / 2), i % (cli.dim / 2));
            position as f64 * 10_000f64.powf(-2.0 * pair as f64 / cli.dim as f64)
        };
        let rotation = |f: fn(f64) -> f64| {
            (0..positions * (cli.dim / 2)).map(|i| f(angle(i)) as f32).collect::<Vec<_>>()
        };
        Ok(Self { problem, layers, cos: rotation(f64::cos), sin: rotation(f64::sin) })
    }

    pub fn layers(&self) -> Vec<Problem> {
        vec![self.problem; self.layers.len()]
    }

    /// The batch through all layers: the last layer's output of every sequence's last token, [Hq · D]
    /// each.
    pub fn forward(
        &self,
        batch: &Batch,
        states: &mut [State],
        slots: &[usize],
    ) -> infini_attn::Result<Vec<Vec<f32>>> {
        let (p, total) = (&self.problem, batch.tokens.len());
        let (width, dim) = (p.heads() * p.key_dim(), p.key_dim());
        let table = |t| TensorView::new(t, &[self.cos.len() / (dim / 2), dim / 2]);
        let rope = Rope::new(table(&self.cos)?, table(&self.sin)?);
        let mut o = vec![0.0; total * width];
        for (layer, state) in self.layers.iter().zip(states) {
            let mut q = gather(&layer.q, &batch.tokens, width);
            q.iter_mut().zip(&o).for_each(|(q, below)| *q += below);
            let [k, v] = [&layer.k, &layer.v].map(|t| gather(t, &batch.tokens, p.kv_heads() * dim));
            let inputs = Inputs::new(
                TensorView::new(&q, &[total, p.heads(), dim])?,
                TensorView::new(&k, &[total, p.kv_heads(), dim])?,
                TensorView::new(&v, &[total, p.kv_heads(), dim])?,
            );
            let inputs = inputs.cu_seqlens(&batch.cu_seqlens).slots(slots).rope(rope);
            let outputs = Outputs::new(TensorViewMut::new(&mut o, &[total, p.heads(), dim])?);
            forward(p, &inputs, &layer.gate, state, outputs)?;
        }
        let ends = batch.cu_seqlens[1..].iter();
        Ok(ends.map(|&end| o[(end as usize - 1) * width..][..width].to_vec()).collect())
    }

    /// What the engine answers, by streams that nothing else shares.
    pub fn answer_alone(&self, answer: &Answer) -> Vec<u8> {
        let states = self.layers().iter().map(|p| State::new(p, 1)).collect::<Result<Vec<_>, _>>();
        let mut states = states.expect("as much as the engine had");
        let mut next = |tokens: &[u8], rank| {
            let mut batch = Batch::new();
            batch.push(tokens);
            let logits = self.forward(&batch, &mut states, &[0]).expect("as for the engine");
            choose(&logits[0], rank)
        };
        let mut tokens = vec![next(&answer.prompt, answer.rank)];
        while tokens.len() < answer.tokens.len() {
            tokens.push(next(&tokens[tokens.len() - 1..], 0));
        }
        tokens
    }
}

/// The row of every token.
fn gather(table: &[f32], tokens: &[u8], width: usize) -> Vec<f32> {
    tokens.iter().flat_map(|&t| &table[usize::from(t) * width..][..width]).copied().collect()
}

/// The token of the largest channel; `rank`: of the one so many places behind it.
pub fn choose(output: &[f32], rank: usize) -> u8 {
    let mut order: Vec<_> = (0..VOCABULARY).collect();
    order.sort_by(|&a, &b| output[b].total_cmp(&output[a]));
    order[rank] as u8
}
