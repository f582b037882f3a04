//! The operations and the shapes that they are measured at.

use anyhow::Result;
use infini_attn::cuda::Device;
use infini_attn::{DType, Problem};

use crate::switches::is_simulated;

/// Heads, dimensions and lengths of one operation.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub segment: usize,
    /// New tokens per sequence.
    pub tokens: usize,
    pub sequences: usize,
    /// Tokens in every open segment before.
    pub open: usize,
}

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Prefill,
    /// Only the kernel of phase 5, gate −∞: local attention alone.
    Local,
    /// Only phases 1 to 4 of a prefill.
    StatePhases,
    Segment,
    /// `DECODE_STEPS` steps of one token, and the counters put back.
    Decode,
    Flush,
    /// Two partial results.
    MergePartials,
    /// Two states.
    MergeMemories,
    KeySums,
    SegmentMap,
    Compose,
    Apply,
}

/// Steps in one graph: what it takes to put the counters back is spread over them.
pub const DECODE_STEPS: usize = 32;

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub operation: Operation,
    pub shape: Shape,
}

const BASE: Shape =
    Shape { heads: 32, kv_heads: 8, dim: 128, segment: 2048, tokens: 32768, sequences: 1, open: 0 };

/// Everything that is measured, what says most first.
pub fn cases(device: &Device) -> Result<Vec<Case>> {
    fitting(device, [main(), further()].concat())
}

/// What variants of kernels are compared by.
pub fn headline(device: &Device) -> Result<Vec<Case>> {
    fitting(device, main())
}

fn case(operation: Operation, shape: Shape) -> Case {
    Case { operation, shape }
}

/// Every kernel that carries the work, at the shapes that goals are set for.
fn main() -> Vec<Case> {
    let long = Shape { segment: 8192, tokens: 131_072, ..BASE };
    let one = Shape { sequences: 1, tokens: 2048, ..BASE };
    let step = |sequences| Shape { sequences, tokens: 1, open: 1024, ..BASE };
    vec![
        case(Operation::Local, BASE),
        case(Operation::Decode, step(64)),
        case(Operation::Prefill, BASE),
        case(Operation::StatePhases, BASE),
        case(Operation::Local, long),
        case(Operation::StatePhases, Shape { segment: 256, ..BASE }),
        case(Operation::Decode, step(1)),
        case(Operation::Segment, one),
        case(Operation::Segment, Shape { sequences: 8, ..one }),
        case(Operation::Local, Shape { dim: 64, ..BASE }),
        case(Operation::Local, Shape { dim: 256, heads: 16, kv_heads: 4, ..BASE }),
    ]
}

fn further() -> Vec<Case> {
    let with = |segment, tokens| Shape { segment, tokens, ..BASE };
    let lengths = [(2048, 131_072), (2048, 1 << 20), (8192, 131_072), (512, 32768), (256, 32768)];
    let mut all: Vec<_> =
        lengths.into_iter().map(|(n, t)| case(Operation::Prefill, with(n, t))).collect();
    let maps = Shape { sequences: 64, tokens: 64, ..BASE };
    all.extend([
        case(Operation::Prefill, Shape { dim: 64, ..BASE }),
        case(Operation::Prefill, Shape { dim: 256, heads: 16, kv_heads: 4, ..BASE }),
        case(Operation::Decode, Shape { sequences: 8, tokens: 1, open: 1024, ..BASE }),
        case(Operation::Local, with(256, 32768)),
        case(Operation::StatePhases, with(8192, 131_072)),
        case(Operation::Flush, Shape { sequences: 64, tokens: 1024, open: 1024, ..BASE }),
        case(Operation::MergePartials, BASE),
        case(Operation::KeySums, BASE),
        case(Operation::SegmentMap, BASE),
        case(Operation::MergeMemories, maps),
        case(Operation::Compose, maps),
        case(Operation::Apply, maps),
    ]);
    all
}

/// The same; on the simulator with tiny shapes, each once.
fn fitting(device: &Device, mut cases: Vec<Case>) -> Result<Vec<Case>> {
    if !is_simulated(device)? {
        return Ok(cases);
    }
    for Case { operation, shape } in &mut cases {
        let most = if *operation == Operation::Segment { 64 } else { 128 };
        (shape.heads, shape.kv_heads, shape.segment) = (2, 1, 64);
        shape.tokens = shape.tokens.min(most);
        (shape.sequences, shape.open) = (shape.sequences.min(2), shape.open.min(32));
    }
    let mut seen = std::collections::HashSet::new();
    cases.retain(|case| seen.insert(case.name()));
    Ok(cases)
}

impl Case {
    pub fn name(&self) -> String {
        let Shape { heads, kv_heads, dim, segment, tokens, sequences, open } = self.shape;
        let operation = match self.operation {
            Operation::Prefill => "prefill",
            Operation::Local => "local attention",
            Operation::StatePhases => "state phases",
            Operation::Segment => "segment",
            Operation::Decode => "decode",
            Operation::Flush => "flush",
            Operation::MergePartials => "merge of two parts",
            Operation::MergeMemories => "merge of two states",
            Operation::KeySums => "key sums",
            Operation::SegmentMap => "map",
            Operation::Compose => "compose",
            Operation::Apply => "apply",
        };
        let open = if open > 0 { format!(", {open} open") } else { String::new() };
        format!(
            "{operation}, {heads}/{kv_heads} heads x {dim}, N {segment}, {sequences} x {tokens}{open}"
        )
    }

    /// Flops of the formula and bytes that must move, for one run.
    pub fn work(&self) -> [f64; 2] {
        let s = self.shape;
        let [hq, hkv, d, n] = [s.heads, s.kv_heads, s.dim, s.segment].map(|x| x as f64);
        let t = (s.tokens * s.sequences) as f64;
        let segments = (t / n).max(s.sequences as f64);
        let keys = if self.operation == Operation::Decode { s.open as f64 + 16.0 } else { n / 2.0 };
        let local = t * hq * 4.0 * keys * d;
        let (retrieval, update) = (t * hq * 2.0 * d * d, t * hkv * 4.0 * d * d);
        let (q, kv) = (t * hq * d * 2.0, t * hkv * d * 2.0);
        // M and its snapshot, per KV head and sequence.
        let memory = s.sequences as f64 * hkv * d * d;
        let cache = s.sequences as f64 * hkv * 2.0 * d * keys * 2.0;
        match self.operation {
            Operation::Prefill => [local + retrieval + update, 2.0 * q + 2.0 * kv],
            Operation::Local => [local, 2.0 * q + 2.0 * kv],
            // K and V once, a snapshot per segment.
            Operation::StatePhases => [update, 2.0 * kv + segments * hkv * d * d * 2.0],
            Operation::Segment => [local + retrieval + update, 2.0 * q + 2.0 * kv + memory * 10.0],
            Operation::Decode => [local + retrieval, 2.0 * q + 4.0 * kv + cache + memory * 2.0],
            Operation::Flush => [update, 2.0 * kv + memory * 10.0],
            Operation::MergePartials => [t * hq * 4.0 * d, 3.0 * q + 8.0 * t * hq],
            // M of both, the sum, its snapshot.
            Operation::MergeMemories => [memory, memory * 14.0],
            Operation::KeySums => [t * hkv * d, kv],
            // Two products per segment, of I - G with A and with B.
            Operation::SegmentMap => {
                [update + segments * hkv * 4.0 * d * d * d, 2.0 * kv + memory * 8.0]
            }
            Operation::Compose => [memory * 4.0 * d, memory * 24.0],
            Operation::Apply => [memory * 2.0 * d, memory * 18.0],
        }
    }

    pub fn problem(&self) -> Result<Problem> {
        let s = self.shape;
        let builder = Problem::builder().heads(s.heads).kv_heads(s.kv_heads).head_dim(s.dim);
        Ok(builder.segment_len(s.segment).dtype(DType::BF16).build()?)
    }
}
