//! The table of cases for backends of 16-bit tensor cores: its levels (rules, batches, rotations,
//! gates, ...) joined pairwise, in every shape that kernels are compiled for, at sizes that the
//! simulator runs quickly.

use std::collections::BTreeSet;

use infini_attn::{DType, Denominator, EmptyMemory, Problem, Update};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};

use super::buffers::{Arrangement, Asked};
use super::call::TABLE_ROWS;
use super::cases::{Batch, Case, Gate, Positions, Rotation, Values, cases, seed};

/// Element type, Dk and Dv.
pub type Shape = (DType, usize, usize);

/// Longest segment that is taken from the table.
const LONGEST_SEGMENT: usize = 256;

/// Most calls of a case.
const MOST_CALLS: usize = 12;

/// Every pair of levels in at least one case; the shapes take turns.
pub fn pairwise(shapes: &[Shape], budget: u64) -> Vec<Case> {
    every_nth(1, shapes, budget)
}

/// One in `n` of the pairwise cases; the shapes take turns among them.
pub fn every_nth(n: usize, shapes: &[Shape], budget: u64) -> Vec<Case> {
    let (levels, rows) = pairwise_rows();
    let chosen = rows.iter().enumerate().step_by(n).zip(shapes.iter().cycle());
    chosen.map(|((i, row), &shape)| levels.case(i, row, shape, budget)).collect()
}

/// A few of the pairwise cases in which every level occurs; the shapes take turns among them.
pub fn every_level(shapes: &[Shape], budget: u64) -> Vec<Case> {
    let (levels, rows) = pairwise_rows();
    let mut open: BTreeSet<[usize; 2]> = BTreeSet::new();
    for (f, count) in levels.counts().into_iter().enumerate() {
        open.extend((0..count).map(|i| [f, i]));
    }
    let mut chosen = vec![];
    while !open.is_empty() {
        // The one with most that is missing for its work; a case of none takes time as well.
        let cases = rows.iter().enumerate().map(|(i, row)| {
            let case = levels.case(i, row, shapes[chosen.len() % shapes.len()], budget);
            let missing = (0..FACTORS).filter(|&f| open.contains(&[f, row[f]])).count() as u64;
            ((missing << 40) / (50_000_000 + work(&case)), row, case)
        });
        let (_, row, case) = cases.max_by_key(|(worth, ..)| *worth).expect("a row");
        (0..FACTORS).for_each(|f| _ = open.remove(&[f, row[f]]));
        chosen.push(case);
    }
    chosen
}

fn pairwise_rows() -> (Levels, Vec<Row>) {
    let levels = Levels::of(&cases());
    let rows = levels.rows(&mut StdRng::seed_from_u64(13));
    (levels, rows)
}

/// Every case of the table in every shape.
pub fn full(shapes: &[Shape], budget: u64) -> Vec<Case> {
    let short = |c: &Case| c.problem.segment_len() <= LONGEST_SEGMENT;
    let table: Vec<Case> = cases().into_iter().filter(short).collect();
    let mut all = vec![];
    for case in &table {
        for &shape in shapes {
            let mut case = case.clone();
            let channels = |r: Rotation| turn(&case.problem, r).channels(shape.1);
            case.rope = case.rope.map(|r| Rotation { channels: channels(r), ..r });
            let scale = own_scale(&case.problem);
            case.problem = reshape(&case.problem, shape, scale);
            let (dtype, dk, dv) = shape;
            case.name = format!("{dtype} {dk}x{dv}: {}", case.name);
            all.push(fit(case, budget));
        }
    }
    all
}

/// Multiply-adds of a case, query tiles and key blocks filled up.
pub fn work(case: &Case) -> u64 {
    let p = &case.problem;
    let (dk, dv, n) = (p.key_dim(), p.value_dim(), p.segment_len());
    let tokens: usize = (0..case.sequences()).map(|b| case.tokens(b)).sum();
    let calls: usize = case.calls.iter().flatten().filter(|&&len| len > 0).count();
    // At worst a partial tile per call and per segment.
    let rows = tokens + 64 * (calls + tokens / n);
    let keys = n.next_multiple_of(64);
    let attention = p.heads() * rows * (keys * (dk + dv) / 2 + dk * dv);
    let update = p.kv_heads() * (tokens + 64 * (tokens / n)) * dk * (dk + 2 * dv);
    (attention + update) as u64
}

/// How many channels rotate.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Turn {
    All,
    Some,
    Two,
    Zero,
}

impl Turn {
    fn channels(self, dk: usize) -> usize {
        match self {
            Turn::All => dk / 2 * 2,
            Turn::Some => dk / 4 * 2,
            Turn::Two => 2.min(dk / 2 * 2),
            Turn::Zero => 0,
        }
    }
}

fn turn(p: &Problem, r: Rotation) -> Turn {
    match r.channels {
        0 => Turn::Zero,
        c if c == p.key_dim() / 2 * 2 => Turn::All,
        2 => Turn::Two,
        _ => Turn::Some,
    }
}

/// A scale other than the default.
fn own_scale(p: &Problem) -> Option<f64> {
    Some(p.scale()).filter(|s| *s != (p.key_dim() as f64).powf(-0.5))
}

fn reshape(p: &Problem, (dtype, dk, dv): Shape, scale: Option<f64>) -> Problem {
    let scale = scale.unwrap_or((dk as f64).powf(-0.5));
    let builder = p.to_builder().dtype(dtype).key_dim(dk).value_dim(dv).scale(scale);
    builder.build().expect("a case's problem")
}

/// What the table varies.
struct Levels {
    updates: Vec<Update>,
    empties: Vec<EmptyMemory>,
    denominators: Vec<Denominator>,
    batches: Vec<Batch>,
    /// Whether slots are given.
    slots: Vec<bool>,
    /// None, or channels, pairing and magnitude.
    rotations: Vec<Option<(Turn, bool, f64)>>,
    positions: Vec<Positions>,
    gates: Vec<Gate>,
    arrangements: Vec<Arrangement>,
    asked: Vec<Asked>,
    groups: Vec<usize>,
    segments: Vec<usize>,
    values: Vec<Values>,
    scales: Vec<Option<f64>>,
    /// Cases whose calls are alike; they take turns.
    calls: Vec<(Calls, Vec<Case>)>,
}

/// What sets calls apart.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Calls {
    single: bool,
    /// Such as decoding takes.
    short: bool,
    flushed: bool,
    /// Sequences of different lengths.
    ragged: bool,
}

impl Calls {
    fn of(case: &Case) -> Self {
        Self {
            single: case.calls.len() == 1,
            short: case.largest_chunk() <= 16,
            flushed: !case.flush_after.is_empty(),
            ragged: case.calls.iter().any(|c| c.iter().any(|n| *n != c[0])),
        }
    }

    /// Whether the calls of a case are worth their time: something is read from the memory.
    fn suit(case: &Case) -> bool {
        let tokens = (0..case.sequences()).map(|b| case.tokens(b)).max().unwrap_or(0);
        tokens > 2 * case.problem.segment_len() && tokens <= TABLE_ROWS
    }
}

const FACTORS: usize = 15;
const BATCH: usize = 3;
const ROTATION: usize = 5;
const POSITIONS: usize = 6;
const CALLS: usize = 14;

/// A level of every factor.
type Row = [usize; FACTORS];
/// Two levels: factor and level, factor and level.
type Pair = [usize; 4];

impl Levels {
    fn of(table: &[Case]) -> Self {
        fn distinct<L: PartialEq>(table: &[Case], level: impl Fn(&Case) -> L) -> Vec<L> {
            let mut found = vec![];
            for level in table.iter().map(level) {
                if !found.contains(&level) {
                    found.push(level);
                }
            }
            found
        }
        let mut rotations: Vec<Option<(Turn, bool, f64)>> = vec![None];
        for (p, r) in table.iter().filter_map(|c| c.rope.map(|r| (&c.problem, r))) {
            let kind = (turn(p, r), r.interleaved);
            if !rotations.iter().flatten().any(|(t, i, _)| (*t, *i) == kind) {
                rotations.push(Some((kind.0, kind.1, r.magnitude)));
            }
        }
        let mut calls: Vec<(Calls, Vec<Case>)> = vec![];
        for case in table.iter().filter(|c| Calls::suit(c)) {
            let kind = Calls::of(case);
            match calls.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, cases)) => cases.push(case.clone()),
                None => calls.push((kind, vec![case.clone()])),
            }
        }
        let mut segments = distinct(table, |c| c.problem.segment_len());
        segments.retain(|n| *n <= LONGEST_SEGMENT);
        Self {
            updates: distinct(table, |c| c.problem.update()),
            empties: distinct(table, |c| c.problem.empty_memory()),
            denominators: distinct(table, |c| c.problem.denominator()),
            batches: distinct(table, |c| c.batch),
            slots: distinct(table, |c| c.slots.is_some()),
            rotations,
            positions: [Positions::Continued, Positions::Shared, Positions::PerToken].into(),
            gates: distinct(table, |c| c.gate),
            arrangements: distinct(table, |c| c.arrangement),
            asked: distinct(table, |c| c.asked),
            groups: distinct(table, |c| c.problem.group()),
            segments,
            values: distinct(table, |c| c.values),
            scales: distinct(table, |c| own_scale(&c.problem)),
            calls,
        }
    }

    fn counts(&self) -> Row {
        [
            self.updates.len(),
            self.empties.len(),
            self.denominators.len(),
            self.batches.len(),
            self.slots.len(),
            self.rotations.len(),
            self.positions.len(),
            self.gates.len(),
            self.arrangements.len(),
            self.asked.len(),
            self.groups.len(),
            self.segments.len(),
            self.values.len(),
            self.scales.len(),
            self.calls.len(),
        ]
    }

    /// Whether two levels can meet.
    fn meet(&self, [f, i, g, j]: Pair) -> bool {
        let even_only = |batch: usize, calls: usize| {
            self.batches[batch] == Batch::Full && self.calls[calls].0.ragged
        };
        match (f, g) {
            (BATCH, CALLS) => !even_only(i, j),
            // Without rotation there are no positions.
            (ROTATION, POSITIONS) => self.rotations[i].is_some() || j == 0,
            _ => true,
        }
    }

    /// Pairs that a row covers, or would with a level of factor `f` more.
    fn pairs(
        &self,
        row: &[Option<usize>; FACTORS],
        f: usize,
        i: usize,
    ) -> impl Iterator<Item = Pair> {
        let chosen = *row;
        (0..FACTORS)
            .filter(move |g| *g != f)
            .filter_map(move |g| chosen[g].map(|j| if f < g { [f, i, g, j] } else { [g, j, f, i] }))
    }

    /// Rows that cover every pair, found greedily: an open pair, then factor by factor the level
    /// that closes most; the best of several tries.
    fn rows(&self, rng: &mut StdRng) -> Vec<Row> {
        let counts = self.counts();
        let mut open = BTreeSet::new();
        for f in 0..FACTORS {
            for g in f + 1..FACTORS {
                for i in 0..counts[f] {
                    open.extend((0..counts[g]).map(|j| [f, i, g, j]).filter(|p| self.meet(*p)));
                }
            }
        }
        let mut rows = vec![];
        while let Some(&first) = open.iter().nth(rng.random_range(0..open.len().max(1))) {
            let tries: Vec<_> = (0..20).filter_map(|_| self.row(first, &open, rng)).collect();
            let best = tries.into_iter().max_by_key(|(closed, _)| *closed);
            let (_, row) = best.expect("levels that can meet");
            for f in 0..FACTORS {
                (f + 1..FACTORS).for_each(|g| _ = open.remove(&[f, row[f], g, row[g]]));
            }
            rows.push(row);
        }
        rows
    }

    fn row(
        &self,
        [f, i, g, j]: Pair,
        open: &BTreeSet<Pair>,
        rng: &mut StdRng,
    ) -> Option<(usize, Row)> {
        let counts = self.counts();
        let mut row = [None; FACTORS];
        (row[f], row[g]) = (Some(i), Some(j));
        let mut order: Vec<usize> = (0..FACTORS).filter(|h| *h != f && *h != g).collect();
        order.shuffle(rng);
        let mut closed = 1;
        for h in order {
            let allowed = |l: &usize| self.pairs(&row, h, *l).all(|p| self.meet(p));
            let gain = |l: usize| self.pairs(&row, h, l).filter(|p| open.contains(p)).count();
            let gains: Vec<_> = (0..counts[h]).filter(allowed).map(|l| (gain(l), l)).collect();
            let most = gains.iter().map(|(gain, _)| *gain).max()?;
            let best: Vec<_> = gains.into_iter().filter(|(gain, _)| *gain == most).collect();
            row[h] = best.choose(rng).map(|(_, l)| *l);
            closed += most;
        }
        let mut levels = [0; FACTORS];
        for (to, from) in levels.iter_mut().zip(row) {
            *to = from?;
        }
        Some((closed, levels))
    }

    fn case(&self, number: usize, row: &Row, shape: Shape, budget: u64) -> Case {
        let (dtype, dk, dv) = shape;
        let &[u, e, d, b, s, r, pos, gate, arr, ask, grp, n, val, sc, c] = row;
        let (_, alike) = &self.calls[c];
        let from = &alike[number % alike.len()];
        let (n0, n, group) = (from.problem.segment_len(), self.segments[n], self.groups[grp]);
        let p = (from.problem.to_builder().heads(2 * group).kv_heads(2).segment_len(n))
            .update(self.updates[u])
            .empty_memory(self.empties[e])
            .denominator(self.denominators[d])
            .build()
            .expect("a case's problem");
        let mut calls: Vec<Vec<usize>> = (from.calls.iter().take(MOST_CALLS))
            .map(|call| call.iter().map(|&len| scaled(len, n0, n)).collect())
            .collect();
        if self.batches[b] == Batch::Full {
            // Scaling may tell lengths apart; a full batch has one.
            calls.iter_mut().for_each(|c| *c = vec![c[0]; c.len()]);
        }
        let mut flush_after = from.flush_after.clone();
        flush_after.retain(|i| *i < calls.len());
        let slots = self.slots[s].then(|| given_slots(calls[0].len()));
        let rope = self.rotations[r].map(|(turn, interleaved, magnitude)| Rotation {
            channels: turn.channels(dk),
            interleaved,
            positions: self.positions[pos],
            magnitude,
        });
        let mut case = Case {
            name: String::new(),
            problem: reshape(&p, shape, self.scales[sc]),
            batch: self.batches[b],
            calls,
            flush_after,
            slots,
            rope,
            gate: self.gates[gate],
            values: self.values[val],
            arrangement: self.arrangements[arr],
            asked: self.asked[ask],
            seed: 0,
        };
        case = fit(case, budget);
        let p = &case.problem;
        case.name = format!(
            "{number}: {dtype} {dk}x{dv} {}x{group} N={n} {} {} {}, calls of \"{}\"",
            p.kv_heads(),
            p.update(),
            p.empty_memory(),
            p.denominator(),
            from.name
        );
        case.seed = seed(&case.name);
        case
    }
}

/// Slots in falling order, one before and one after them left alone.
fn given_slots(sequences: usize) -> (Vec<usize>, usize) {
    ((1..=sequences).rev().collect(), sequences + 2)
}

/// A number of tokens of a case with segments of `from`, seen from its segments' ends, at another
/// segment length.
fn scaled(len: usize, from: usize, to: usize) -> usize {
    let (full, rest) = ((len / from).min(3), len % from);
    if 2 * rest <= from {
        full * to + rest.min(to.div_ceil(2))
    } else {
        (full + 1) * to - (from - rest).min(to - 1)
    }
}

/// Fewer sequences, heads and segments until a case fits the budget.
fn fit(mut case: Case, budget: u64) -> Case {
    let most_tokens = |c: &Case| (0..c.sequences()).map(|b| c.tokens(b)).max().unwrap_or(0);
    while work(&case) > budget || most_tokens(&case) > TABLE_ROWS {
        let p = case.problem;
        let n = p.segment_len();
        let longest = case.calls.iter_mut().max_by_key(|c| c.iter().copied().max());
        let longest = longest.expect("work needs a call");
        if longest.len() > 2 {
            case.calls.iter_mut().for_each(|c| _ = c.pop());
            if let Some((slots, _)) = &mut case.slots {
                slots.pop();
            }
        } else if p.kv_heads() > 1 {
            let builder = p.to_builder().kv_heads(p.kv_heads() - 1);
            let builder = builder.heads(p.group() * (p.kv_heads() - 1));
            case.problem = builder.build().expect("a case's problem");
        } else if longest.iter().any(|len| *len > 2 * n) {
            longest.iter_mut().filter(|len| **len > 2 * n).for_each(|len| *len -= n);
        } else if case.calls.len() > 2 {
            case.calls.pop();
            let calls = case.calls.len();
            case.flush_after.retain(|i| *i < calls);
        } else {
            return case;
        }
    }
    case
}
