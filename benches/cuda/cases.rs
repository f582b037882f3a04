//! The operations and the shapes that they are measured at.

use anyhow::Result;
use infini_attn::cuda::Device;
use infini_attn::{DType, Problem};

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

/// Whether the driver is the simulator's.
pub fn is_simulated(device: &Device) -> Result<bool> {
    Ok(device.name()? == "PTX simulator")
}

/// Everything that is measured.
pub fn cases(device: &Device) -> Result<Vec<Case>> {
    fitting(device, all())
}

/// What variants of kernels are compared by: every kernel that carries the work, at the shapes of the
/// table of goals.
pub fn headline(device: &Device) -> Result<Vec<Case>> {
    let case = |operation, shape| Case { operation, shape };
    let long = Shape { segment: 8192, tokens: 131_072, ..BASE };
    let few = Shape { sequences: 1, tokens: 2048, ..BASE };
    let step = |sequences| Shape { sequences, tokens: 1, open: 1024, ..BASE };
    let all = vec![
        case(Operation::Local, BASE),
        case(Operation::Local, long),
        case(Operation::Local, Shape { dim: 64, ..BASE }),
        case(Operation::Local, Shape { dim: 256, heads: 16, kv_heads: 4, ..BASE }),
        case(Operation::Prefill, BASE),
        case(Operation::StatePhases, BASE),
        case(Operation::StatePhases, Shape { segment: 256, ..BASE }),
        case(Operation::Segment, few),
        case(Operation::Segment, Shape { sequences: 8, ..few }),
        case(Operation::Decode, step(1)),
        case(Operation::Decode, step(64)),
    ];
    fitting(device, all)
}

/// The same; on the simulator with tiny shapes, each once.
fn fitting(device: &Device, mut cases: Vec<Case>) -> Result<Vec<Case>> {
    if is_simulated(device)? {
        for Case { shape, .. } in &mut cases {
            (shape.heads, shape.kv_heads, shape.segment) = (2, 1, 64);
            shape.tokens = shape.tokens.min(128);
            (shape.sequences, shape.open) = (shape.sequences.min(2), shape.open.min(32));
        }
        for case in &mut cases {
            if case.operation == Operation::Segment {
                case.shape.tokens = 64;
            }
        }
        let mut seen = std::collections::HashSet::new();
        cases.retain(|case| seen.insert(case.name()));
    }
    Ok(cases)
}

fn all() -> Vec<Case> {
    let case = |operation, shape| Case { operation, shape };
    let with = |segment, tokens| Shape { segment, tokens, ..BASE };
    let mut all = vec![];
    for shape in [BASE, with(8192, 131_072), with(256, 32768)] {
        all.extend([Operation::Local, Operation::StatePhases].map(|o| case(o, shape)));
    }
    let lengths = [(2048, 32768), (2048, 131_072), (2048, 1 << 20), (8192, 131_072)];
    all.extend(lengths.map(|(n, t)| case(Operation::Prefill, with(n, t))));
    all.extend([(512, 32768), (256, 32768)].map(|(n, t)| case(Operation::Prefill, with(n, t))));
    all.push(case(Operation::Prefill, Shape { dim: 64, ..BASE }));
    all.push(case(Operation::Prefill, Shape { dim: 256, heads: 16, kv_heads: 4, ..BASE }));
    for sequences in [1, 8] {
        all.push(case(Operation::Segment, Shape { sequences, tokens: 2048, ..BASE }));
    }
    for sequences in [1, 8, 64] {
        all.push(case(Operation::Decode, Shape { sequences, tokens: 1, open: 1024, ..BASE }));
    }
    all.push(case(Operation::Flush, Shape { sequences: 64, tokens: 1024, open: 1024, ..BASE }));
    let over_tokens = [Operation::MergePartials, Operation::KeySums, Operation::SegmentMap];
    all.extend(over_tokens.map(|o| case(o, BASE)));
    let maps = Shape { sequences: 64, tokens: 64, ..BASE };
    let over_states = [Operation::MergeMemories, Operation::Compose, Operation::Apply];
    all.extend(over_states.map(|o| case(o, maps)));
    all
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
