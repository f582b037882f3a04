//! The one table of cases that every backend is tested by.

use infini_attn::{DType, Denominator, EmptyMemory, Problem, Update};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use super::buffers::{Arrangement, Asked};

/// Every layout.
pub const BATCHES: [Batch; 4] = [Batch::Full, Batch::Padded, Batch::Ranges, Batch::Packed];

/// One stream per sequence, cut into calls. Data are seeded per sequence and do not depend on how
/// they are laid out or cut.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub problem: Problem,
    pub batch: Batch,
    /// Tokens of every sequence in every call: `calls[i][b]`.
    pub calls: Vec<Vec<usize>>,
    /// After these calls every open segment is committed.
    pub flush_after: Vec<usize>,
    /// Slot of every sequence, and how many the state has; none: the identity.
    pub slots: Option<(Vec<usize>, usize)>,
    pub rope: Option<Rotation>,
    pub gate: Gate,
    pub values: Values,
    pub arrangement: Arrangement,
    pub asked: Asked,
    pub seed: u64,
}

/// How a call's sequences are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Batch {
    /// [B, T, H, D], all sequences of one length.
    Full,
    /// [B, T + 2, H, D] with lengths; two rows of padding after the longest.
    Padded,
    /// The same with ranges: the two rows and what a sequence is shorter by stand before it, around it,
    /// behind it, in turns.
    Ranges,
    /// [total, H, D] with cumulative lengths.
    Packed,
}

/// Rotation of the local branch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotation {
    /// R, at most Dk.
    pub channels: usize,
    pub interleaved: bool,
    pub positions: Positions,
    pub magnitude: f64,
}

/// Where the table rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Positions {
    /// Continued from the state.
    Continued,
    /// One list for all sequences of a call.
    Shared,
    /// One entry per token of the batch, in no order.
    PerToken,
}

/// Gate logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// N(0, 1).
    Normal,
    /// These, repeated over the heads.
    Of(&'static [f32]),
}

/// Distribution of the inputs: N(0, 1) times a scale plus a shift, each for q, k and v.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Values {
    pub scale: [f32; 3],
    pub shift: [f32; 3],
}

pub const NORMAL: Values = Values { scale: [1.0; 3], shift: [0.0; 3] };

/// (Dk, Dv) that the table covers.
pub const DIMS: [(usize, usize); 10] = [
    (64, 64),
    (96, 96),
    (128, 128),
    (64, 128),
    (128, 64),
    (192, 128),
    (256, 256),
    (5, 3),
    (1, 1),
    (16, 8),
];
/// Segment lengths that the table covers.
pub const SEGMENTS: [usize; 8] = [1, 2, 7, 16, 33, 64, 128, 129];
/// Element types.
pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Update rules.
pub const RULES: [Update; 2] = [Update::Linear, Update::Delta];
/// Empty-memory policies.
pub const EMPTY: [EmptyMemory; 2] = [EmptyMemory::Gate, EmptyMemory::Bypass];
/// Denominators.
pub const DENOMINATORS: [Denominator; 3] =
    [Denominator::Exact, Denominator::Clamp(1e-2), Denominator::Add(1e-2)];

/// The table.
pub fn cases() -> Vec<Case> {
    let mut all = [
        dimensions(),
        lengths(),
        policies(),
        splits(),
        batches(),
        rotations(),
        gates(),
        arrangements(),
        values(),
        long(),
        large(),
        mixed(),
    ]
    .concat();
    for case in &mut all {
        case.seed = seed(&case.name);
    }
    all
}

/// FNV-1a of a case's name: it keeps its data when the table changes.
pub fn seed(name: &str) -> u64 {
    let hash = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, hash) >> 32
}

impl Case {
    /// f32, delta, 2 query heads on 1 KV head, (Dk, Dv) = (16, 8), N = 16, one call of 53 tokens.
    pub fn base(name: impl Into<String>) -> Case {
        let problem = build(|b| b.heads(2).kv_heads(1).key_dim(16).value_dim(8).segment_len(16));
        Case {
            name: name.into(),
            problem,
            batch: Batch::Full,
            calls: vec![vec![53]],
            flush_after: vec![],
            slots: None,
            rope: None,
            gate: Gate::Normal,
            values: NORMAL,
            arrangement: Arrangement::Contiguous,
            asked: Asked::ALL,
            seed: 0,
        }
    }

    pub fn with(
        mut self,
        change: impl FnOnce(infini_attn::ProblemBuilder) -> infini_attn::ProblemBuilder,
    ) -> Case {
        self.problem = change(self.problem.to_builder()).build().expect("a case's problem");
        self
    }

    /// Sequences of the batch.
    pub fn sequences(&self) -> usize {
        self.calls[0].len()
    }

    /// Tokens of a sequence's whole stream.
    pub fn tokens(&self, sequence: usize) -> usize {
        self.calls.iter().map(|c| c[sequence]).sum()
    }

    /// The same streams in calls of at most `most` tokens per sequence.
    pub fn recut(self, most: usize) -> Case {
        let (mut calls, mut flush_after) = (vec![], vec![]);
        for (i, call) in self.calls.iter().enumerate() {
            let longest = call.iter().copied().max().unwrap_or(0);
            for start in (0..longest.max(1)).step_by(most) {
                calls.push(call.iter().map(|n| n.saturating_sub(start).min(most)).collect());
            }
            if self.flush_after.contains(&i) {
                flush_after.push(calls.len() - 1);
            }
        }
        Case { name: format!("{} by {most}", self.name), calls, flush_after, ..self }
    }

    /// The same streams in calls that end where a segment of theirs ends.
    pub fn within_segments(self) -> Case {
        let n = self.problem.segment_len();
        let mut open = vec![0; self.sequences()];
        let (mut calls, mut flush_after) = (vec![], vec![]);
        for (i, call) in self.calls.iter().enumerate() {
            let mut rest = call.clone();
            loop {
                let taken: Vec<usize> =
                    rest.iter().zip(&open).map(|(rest, open)| *rest.min(&(n - open))).collect();
                for (b, taken) in taken.iter().enumerate() {
                    rest[b] -= taken;
                    open[b] = (open[b] + taken) % n;
                }
                calls.push(taken);
                if rest.iter().all(|rest| *rest == 0) {
                    break;
                }
            }
            if self.flush_after.contains(&i) {
                flush_after.push(calls.len() - 1);
                open.fill(0);
            }
        }
        Case { name: format!("{} within segments", self.name), calls, flush_after, ..self }
    }

    /// Largest number of tokens a sequence has in one call.
    pub fn largest_chunk(&self) -> usize {
        self.calls.iter().flatten().copied().max().unwrap_or(0)
    }
}

fn build(
    change: impl FnOnce(infini_attn::ProblemBuilder) -> infini_attn::ProblemBuilder,
) -> Problem {
    change(Problem::builder()).build().expect("a case's problem")
}

/// One sequence cut into calls of at most `chunk` tokens.
fn chunks(tokens: usize, chunk: usize) -> Vec<Vec<usize>> {
    (0..tokens).step_by(chunk).map(|at| vec![chunk.min(tokens - at)]).collect()
}

/// Every head shape, group and element type, each with another N and rule.
fn dimensions() -> Vec<Case> {
    let mut out = vec![];
    for (i, (dk, dv)) in DIMS.into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let (kv_heads, group) = [(1, 4), (2, 2), (1, 8), (3, 1), (2, 4)][(i + j) % 5];
            let n = [64, 129, 33, 128, 16][(i + 2 * j) % 5];
            let update = RULES[(i + j) % 2];
            let mut case = Case::base(format!("dims {dk}x{dv} {dtype} {kv_heads}x{group} N={n}"))
                .with(|b| b.heads(kv_heads * group).kv_heads(kv_heads))
                .with(|b| b.key_dim(dk).value_dim(dv).segment_len(n).dtype(dtype).update(update));
            case.calls = vec![vec![2 * n + 5], vec![n]];
            out.push(case);
        }
    }
    out
}

/// Every N against lengths around it and around the tiles of the fast backends.
fn lengths() -> Vec<Case> {
    let mut out = vec![];
    for n in SEGMENTS {
        let around = [n - 1, n, n + 1, 2 * n - 1, 2 * n, 2 * n + 1, 3 * n + 5, 5 * n];
        let tiles = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129];
        let mut tokens = [&around[..], &tiles].concat();
        tokens.sort_unstable();
        tokens.dedup();
        for t in tokens {
            let update = RULES[(t + n) % 2];
            let name = format!("length N={n} T={t} {update}");
            let mut case = Case::base(name).with(|b| b.segment_len(n).update(update));
            case.calls = vec![vec![t]];
            out.push(case);
        }
    }
    out
}

/// Every rule, empty policy, denominator and element type together.
fn policies() -> Vec<Case> {
    let mut out = vec![];
    for update in RULES {
        for empty in EMPTY {
            for denominator in DENOMINATORS {
                for dtype in DTYPES {
                    let name = format!("policy {update} {empty} {denominator} {dtype}");
                    let mut case = Case::base(name).with(|b| {
                        b.update(update).empty_memory(empty).denominator(denominator).dtype(dtype)
                    });
                    case.calls = vec![vec![37], vec![5], vec![21]];
                    // z small enough for ε to matter.
                    case.values.shift = [0.0, -4.0, 0.0];
                    out.push(case);
                }
            }
        }
    }
    for (i, scale) in [0.0, -0.5, 3.0].into_iter().enumerate() {
        out.push(
            Case::base(format!("scale {scale}")).with(|b| b.scale(scale).update(RULES[i % 2])),
        );
    }
    out
}

/// The same streams whole, token by token, in decode chunks, at uneven points, with flushes.
fn splits() -> Vec<Case> {
    let mut out = vec![];
    let mut add = |n: usize, name: String, calls: Vec<Vec<usize>>, flush_after: Vec<usize>| {
        for update in RULES {
            let mut case = Case::base(format!("split N={n} {name} {update}"))
                .with(|b| b.segment_len(n).update(update).dtype(DTYPES[calls.len() % 3]));
            (case.calls, case.flush_after) = (calls.clone(), flush_after.clone());
            out.push(case);
        }
    };
    for n in [1, 2, 7, 16, 33] {
        let t = 3 * n + 5;
        add(n, "token by token".into(), chunks(t, 1), vec![]);
        add(n, "inside a segment".into(), vec![vec![n + n / 2], vec![t - n - n / 2]], vec![]);
        add(n, "at the segment".into(), vec![vec![n], vec![t - n]], vec![]);
        add(n, "empty calls".into(), vec![vec![0], vec![n + 1], vec![0], vec![t - n - 1]], vec![]);
        add(n, "flushes".into(), vec![vec![n + 1], vec![n], vec![0], vec![4]], vec![0, 1, 2]);
    }
    for chunk in 2..=16 {
        add(16, format!("by {chunk}"), chunks(64, chunk), vec![]);
        // Several segment ends inside one short call.
        add(3, format!("by {chunk}"), chunks(50, chunk), vec![]);
    }
    add(300, "commit by decode".into(), vec![vec![290], vec![16], vec![280], vec![9]], vec![2]);
    for n in [64, 128, 129] {
        let calls = [chunks(2 * n + 5, n - 1), vec![vec![1]; 3], vec![vec![16], vec![n]]].concat();
        add(n, "prefill and decode".into(), calls, vec![]);
        // Eq. (9) over-subtracts where a segment is much longer than all before it.
        add(n, "flush of one token".into(), vec![vec![1], vec![3 * n]], vec![0]);
        add(n, "flush inside".into(), vec![vec![n / 2], vec![n], vec![n], vec![7]], vec![0, 2]);
    }
    out
}

/// Ragged batches, empty sequences, slots in odd order with others untouched.
fn batches() -> Vec<Case> {
    let mut out = vec![];
    let ragged = vec![vec![20, 0, 41, 7], vec![0, 0, 16, 16], vec![13, 0, 1, 33], vec![1, 2, 3, 4]];
    let even = vec![vec![20; 4], vec![1; 4], vec![0; 4], vec![31; 4]];
    let decode = [vec![vec![17, 3, 0, 30]], vec![vec![1, 0, 16, 5]; 4]].concat();
    for (i, batch) in BATCHES.into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            for (k, calls) in [&ragged, &even, &decode].into_iter().enumerate() {
                if batch == Batch::Full && k != 1 {
                    continue;
                }
                let slots = [None, Some((vec![5, 0, 3, 1], 7))][(i + j + k) % 2].clone();
                let mut case = Case::base(format!("batch {batch:?} {dtype} {k}"))
                    .with(|b| b.heads(4).kv_heads(2).dtype(dtype).update(RULES[(j + k) % 2]));
                (case.batch, case.calls, case.slots) = (batch, calls.clone(), slots);
                case.flush_after = if k == 0 { vec![1] } else { vec![] };
                out.push(case);
            }
        }
        let mut none = Case::base(format!("batch {batch:?} of no sequences"));
        (none.batch, none.calls, none.slots) = (batch, vec![vec![]], Some((vec![], 2)));
        out.push(none);
        let mut empty = Case::base(format!("batch {batch:?} of empty sequences"));
        (empty.batch, empty.calls) = (batch, vec![vec![0, 0], vec![18, 18], vec![0, 0]]);
        out.push(empty);
    }
    out
}

/// Full and partial rotation, both pairings, positions continued and given, magnitudes.
fn rotations() -> Vec<Case> {
    let mut out = vec![];
    for (i, channels) in [16, 8, 2, 0].into_iter().enumerate() {
        for interleaved in [false, true] {
            for positions in [Positions::Continued, Positions::Shared, Positions::PerToken] {
                for batch in BATCHES {
                    let name = format!("rope {channels} {interleaved} {positions:?} {batch:?}");
                    let mut case = Case::base(name).with(|b| b.dtype(DTYPES[out.len() % 3]));
                    let magnitude = [1.0, 1.2, 0.7, 1.0][i];
                    case.rope = Some(Rotation { channels, interleaved, positions, magnitude });
                    (case.batch, case.calls) = (batch, vec![vec![21, 21], vec![16, 16]]);
                    if batch != Batch::Full {
                        case.calls.extend([vec![3, 0], vec![0, 18], vec![1, 1]]);
                    }
                    out.push(case);
                }
            }
        }
    }
    for (dk, channels, n) in [(128, 128, 64), (64, 32, 129), (5, 4, 7)] {
        for interleaved in [false, true] {
            let mut case = Case::base(format!("rope {channels} of {dk} {interleaved} N={n}"))
                .with(|b| b.key_dim(dk).segment_len(n));
            let positions = Positions::Continued;
            case.rope = Some(Rotation { channels, interleaved, positions, magnitude: 1.0 });
            case.calls = vec![vec![n + 3], vec![9], vec![n], vec![1]];
            case.flush_after = vec![1];
            out.push(case);
        }
    }
    out
}

/// Gates that close a branch, or nearly do.
fn gates() -> Vec<Case> {
    const GATES: [&[f32]; 7] = [
        &[f32::NEG_INFINITY],
        &[f32::INFINITY],
        &[f32::INFINITY, f32::NEG_INFINITY, 0.0],
        &[-1e4, 1e4],
        &[80.0, -80.0],
        &[20.0, -20.0, f32::MAX, f32::MIN],
        &[0.0],
    ];
    let mut out = vec![];
    for gate in GATES {
        for empty in EMPTY {
            let mut case = Case::base(format!("gate {gate:?} {empty}"))
                .with(|b| b.heads(4).kv_heads(2).empty_memory(empty).dtype(DTYPES[out.len() % 3]));
            (case.gate, case.calls) = (Gate::Of(gate), vec![vec![30], vec![2], vec![9]]);
            // Only a closed branch that nobody asked for need not be computed.
            for (name, asked) in [
                ("all", Asked::ALL),
                ("o", Asked::NONE),
                ("o a_mem", Asked { a_mem: true, ..Asked::NONE }),
                ("o lse", Asked { lse: true, ..Asked::NONE }),
            ] {
                out.push(Case { name: format!("{} {name}", case.name), asked, ..case.clone() });
            }
        }
    }
    out
}

/// Memory arrangements of inputs and outputs, and every choice of outputs.
fn arrangements() -> Vec<Case> {
    use Arrangement::{Contiguous, Gaps, HeadsFirst, Reversed};
    let mut out = vec![];
    for arrangement in [Contiguous, HeadsFirst, Gaps, Reversed] {
        for (i, batch) in BATCHES.into_iter().enumerate() {
            for dims in [(16, 8), (64, 64)] {
                let mut case =
                    Case::base(format!("arrangement {arrangement:?} {batch:?} {dims:?}"))
                        .with(|b| b.heads(4).kv_heads(2).key_dim(dims.0).value_dim(dims.1))
                        .with(|b| b.dtype(DTYPES[i % 3]));
                (case.arrangement, case.batch) = (arrangement, batch);
                case.calls = vec![vec![35, 35], vec![3, 3], vec![1, 1]];
                out.push(case);
            }
        }
    }
    for mask in 0..8 {
        let bit = |i| mask >> i & 1 == 1;
        let mut case = Case::base(format!("outputs {mask:03b}")).with(|b| b.heads(2).kv_heads(2));
        case.asked = Asked { lse: bit(0), a_dot: bit(1), a_mem: bit(2) };
        case.calls = vec![vec![40], vec![2]];
        out.push(case);
    }
    out
}

/// Inputs away from N(0, 1).
fn values() -> Vec<Case> {
    let mut out = vec![];
    for (name, scale, shift) in [
        ("σ(q) = exp throughout", 1.0, [-9.0, 0.0, 0.0]),
        ("σ(k) = exp throughout", 1.0, [0.0, -9.0, 0.0]),
        ("both exp throughout", 1.0, [-9.0, -9.0, 0.0]),
        ("q far below f32's exp", 1.0, [-300.0, 0.0, 0.0]),
        ("large", 8.0, [0.0; 3]),
        ("small", 1e-3, [0.0; 3]),
        ("values with a mean", 1.0, [0.0, 0.0, 100.0]),
        ("keys with a mean", 1.0, [0.0, 30.0, 0.0]),
        ("zero", 0.0, [0.0; 3]),
    ] {
        for update in RULES {
            for dtype in DTYPES {
                let mut case = Case::base(format!("values {name} {update} {dtype}"))
                    .with(|b| b.update(update).dtype(dtype));
                case.values = Values { scale: [scale; 3], shift };
                case.calls = vec![vec![50], vec![4]];
                out.push(case);
            }
        }
    }
    out
}

/// Many segments: more than one workspace of the fast backends holds, and enough to drift.
fn long() -> Vec<Case> {
    let mut out = vec![];
    for update in RULES {
        for (dim, n, kv_heads, tokens) in [
            (256, 1, 1, 150),
            (256, 2, 2, 170),
            (128, 2, 3, 400),
            (16, 16, 1, 20_003),
            (16, 3, 2, 3000),
        ] {
            let mut case = Case::base(format!("long {dim} N={n} T={tokens} {update}"))
                .with(|b| b.heads(kv_heads).kv_heads(kv_heads).head_dim(dim))
                .with(|b| b.segment_len(n).update(update));
            case.calls = vec![vec![tokens - 2], vec![2]];
            out.push(case);
        }
    }
    out
}

/// Segments as long as models use them, every dtype.
fn large() -> Vec<Case> {
    let mut out = vec![];
    for (i, (heads, kv_heads, dim, n)) in
        [(8, 2, 64, 512), (4, 1, 128, 256), (2, 1, 64, 2048)].into_iter().enumerate()
    {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let update = RULES[(i + j) % 2];
            let mut case = Case::base(format!("large {heads}x{kv_heads} {dim} N={n} {dtype}"))
                .with(|b| b.heads(heads).kv_heads(kv_heads).head_dim(dim).segment_len(n))
                .with(|b| b.dtype(dtype).update(update));
            case.calls = vec![vec![2 * n + 37], vec![16]];
            out.push(case);
        }
    }
    out
}

/// Every axis drawn at once, from a fixed seed: the combinations nobody thought of.
fn mixed() -> Vec<Case> {
    let mut rng = StdRng::seed_from_u64(2404_07143);
    (0..120).map(|i| mixed_case(i, &mut rng)).collect()
}

fn mixed_case(i: usize, rng: &mut StdRng) -> Case {
    fn pick<T: Copy>(rng: &mut StdRng, of: &[T]) -> T {
        *of.choose(rng).expect("a list that is not empty")
    }
    let (dk, dv) = pick(rng, &[(16, 8), (5, 3), (1, 1), (64, 64), (33, 17), (64, 128), (96, 96)]);
    let kv_heads = pick(rng, &[1, 2, 3]);
    let n = pick(rng, &SEGMENTS);
    let mut case = Case::base(format!("mixed {i}"))
        .with(|b| b.heads(kv_heads * pick(rng, &[1, 2, 4, 8])).kv_heads(kv_heads))
        .with(|b| b.key_dim(dk).value_dim(dv).segment_len(n).update(pick(rng, &RULES)))
        .with(|b| b.empty_memory(pick(rng, &EMPTY)).denominator(pick(rng, &DENOMINATORS)))
        .with(|b| b.dtype(pick(rng, &DTYPES)));
    case.batch = pick(rng, &BATCHES);
    case.arrangement = pick(
        rng,
        &[
            Arrangement::Contiguous,
            Arrangement::HeadsFirst,
            Arrangement::Gaps,
            Arrangement::Reversed,
        ],
    );
    let b = rng.random_range(1..4);
    case.calls = (0..rng.random_range(1..6))
        .map(|_| {
            let most = pick(rng, &[1, 16, n, 2 * n + 3]);
            let even = rng.random_range(0..=most);
            let ragged = case.batch != Batch::Full;
            (0..b).map(|_| if ragged { rng.random_range(0..=most) } else { even }).collect()
        })
        .collect();
    case.flush_after = (0..case.calls.len()).filter(|_| rng.random_bool(0.15)).collect();
    if rng.random_bool(0.5) {
        let mut slots: Vec<usize> = (0..b + 2).collect();
        slots.rotate_left(rng.random_range(0..b + 2));
        slots.truncate(b);
        case.slots = Some((slots, b + 2));
    }
    if dk > 1 && rng.random_bool(0.5) {
        case.rope = Some(Rotation {
            channels: 2 * rng.random_range(1..=dk / 2),
            interleaved: rng.random_bool(0.5),
            positions: pick(rng, &[Positions::Continued, Positions::Shared, Positions::PerToken]),
            magnitude: 1.0,
        });
    }
    let mut asked = || rng.random_bool(0.6);
    case.asked = Asked { lse: asked(), a_dot: asked(), a_mem: asked() };
    case
}
