//! Runs a case through a backend, call by call, and through the float64 reference, one sequence at
//! a time and uncut, and compares everything.

use std::collections::BTreeMap;

use infini_attn::{Element, MAX_DECODE_TOKENS, Problem, reference};
use rayon::prelude::*;

use super::backend::Backend;
use super::buffers::{Arrangement, OutputBuffers, Strided};
use super::call::{Call, CallRope, CallShape, TABLE_ROWS, rope};
use super::cases::{Batch, Case, Gate, Positions};
use super::metric::{Axes, log_rms, relative_rms};
use super::plain::{Plain, Rows};
use super::stream::{Stream, normals, rope_tables};
use super::tolerance::{MAIN, Precision, ROUNDED_SUM_TOLERANCE, Results, Tolerances};
use super::{WithType, widen, with_type};

/// What became of a table of cases.
#[derive(Debug, Default)]
pub struct Summary {
    pub ran: usize,
    /// Reasons, each with the number of cases.
    pub refused: BTreeMap<&'static str, usize>,
    /// Largest relative RMS error met per tensor.
    pub worst: BTreeMap<(&'static str, String), (f64, String)>,
    pub failures: Vec<String>,
}

impl Summary {
    fn add(&mut self, case: &Case, checks: Vec<Check>) {
        self.ran += 1;
        for check in checks {
            match check {
                Ok((tensor, rms)) => {
                    let dtype = case.problem.dtype().to_string();
                    let worst = self.worst.entry((tensor, dtype)).or_default();
                    if rms >= worst.0 {
                        *worst = (rms, case.name.clone());
                    }
                }
                Err(failure) => self.failures.push(format!("{}: {failure}", case.name)),
            }
        }
    }

    /// Adds what became of further cases.
    pub fn absorb(&mut self, other: Self) {
        self.ran += other.ran;
        other
            .refused
            .into_iter()
            .for_each(|(reason, n)| *self.refused.entry(reason).or_default() += n);
        for (tensor, worst) in other.worst {
            let known = self.worst.entry(tensor).or_default();
            if worst.0 >= known.0 {
                *known = worst;
            }
        }
        self.failures.extend(other.failures);
    }

    /// Prints the figures.
    pub fn print(&self, backend: &str) {
        println!("{backend}: {} cases ran, refused: {:?}", self.ran, self.refused);
        for ((tensor, dtype), (rms, case)) in &self.worst {
            println!("  {tensor} {dtype}: largest relative RMS error {rms:.1e} ({case})");
        }
    }

    /// Prints the figures and fails if any case did.
    pub fn finish(self, backend: &str) -> Self {
        self.print(backend);
        let failures = &self.failures;
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
        self
    }
}

/// Runs every case that the backend does not refuse.
pub fn run_cases<B: Backend>(backend: &B, cases: &[Case]) -> Summary {
    let run = |case: &Case| match backend.refuses(case) {
        Some(reason) => Err(reason),
        None => Ok(with_type(case.problem.dtype(), Job { backend, case })),
    };
    let outcomes: Vec<_> = match B::PARALLEL {
        true => cases.par_iter().with_max_len(1).map(run).collect(),
        false => cases.iter().map(run).collect(),
    };
    let mut summary = Summary::default();
    for (case, outcome) in cases.iter().zip(outcomes) {
        match outcome {
            Err(reason) => *summary.refused.entry(reason).or_default() += 1,
            Ok(checks) => summary.add(case, checks),
        }
    }
    summary
}

/// One comparison: the tensor's name and its error, or a sentence.
type Check = std::result::Result<(&'static str, f64), String>;

struct Job<'a, B> {
    backend: &'a B,
    case: &'a Case,
}

impl<B: Backend> WithType for Job<'_, B> {
    type Output = Vec<Check>;

    fn run<T: Element>(self) -> Vec<Check> {
        let tables = self.case.rope.map(|r| rope_tables(TABLE_ROWS, r.channels, r.magnitude));
        let tables = tables.as_ref().map(|(cos, sin)| (&cos[..], &sin[..]));
        let mut run = Run::<T, B>::new(self.backend, self.case, tables);
        run.fill_bystanders();
        (0..self.case.calls.len()).for_each(|i| run.call(i));
        if !run.broken {
            run.check_state();
            run.check_outputs();
        }
        run.checks
    }
}

struct Run<'a, T, B: Backend> {
    backend: &'a B,
    case: &'a Case,
    gate: Vec<f32>,
    /// Rotation tables.
    tables: Option<(&'a [f32], &'a [f32])>,
    streams: Vec<Stream<T>>,
    /// Table row of every token, per sequence.
    positions: Vec<Vec<i64>>,
    state: B::State,
    /// Slots that no sequence uses, with their M and z.
    bystanders: Vec<(usize, [Vec<f64>; 2], [u64; 3])>,
    seen: Vec<usize>,
    gathered: Vec<Results>,
    checks: Vec<Check>,
    /// A call has failed: no further ones are made.
    broken: bool,
}

impl<'a, T: Element, B: Backend> Run<'a, T, B> {
    fn new(backend: &'a B, case: &'a Case, tables: Option<(&'a [f32], &'a [f32])>) -> Self {
        let p = &case.problem;
        let gate = match case.gate {
            Gate::Normal => normals(case.seed, p.heads()),
            Gate::Of(list) => list.iter().copied().cycle().take(p.heads()).collect(),
        };
        let streams = (0..case.sequences()).map(|b| stream(case, b)).collect::<Vec<_>>();
        let slots = case.slots.as_ref().map_or(case.sequences(), |(_, n)| *n);
        Self {
            backend,
            case,
            gate,
            tables,
            streams,
            positions: positions(case),
            state: backend.new_state(case, slots),
            bystanders: vec![],
            seen: vec![0; case.sequences()],
            gathered: (0..case.sequences()).map(|_| Results::default()).collect(),
            checks: vec![],
            broken: false,
        }
    }

    fn slot(&self, sequence: usize) -> usize {
        self.case.slots.as_ref().map_or(sequence, |(slots, _)| slots[sequence])
    }

    /// Gives every slot that the case leaves alone a memory and an open segment of its own.
    fn fill_bystanders(&mut self) {
        let p = &self.case.problem;
        let slots = self.case.slots.as_ref().map_or(self.case.sequences(), |(_, n)| *n);
        let used: Vec<usize> = (0..self.case.sequences()).map(|b| self.slot(b)).collect();
        for slot in (0..slots).filter(|s| !used.contains(s)) {
            let stream = Stream::<T>::normal(p, p.segment_len() + 1, 900 + slot as u64);
            let (mut start, n) = (0, p.segment_len());
            while start < stream.tokens {
                // Calls that every entry point serves.
                let len = MAX_DECODE_TOKENS.min(n - start % n).min(stream.tokens - start);
                let [q, k, v] = self.buffers(&[1, len], Arrangement::Contiguous);
                let mut call = Call {
                    q,
                    k,
                    v,
                    batch: Batch::Full,
                    lens: vec![len as i32],
                    ranges: CallShape::new(Batch::Full, &[len]).ranges(&[len]),
                    cu: vec![0, len as i32],
                    slots: Some(vec![slot]),
                    rope: None,
                };
                (0..len).for_each(|t| fill(p, &mut call, &[0, t], &stream, start + t));
                let what = format!("bystander {slot}");
                self.run(&[1, len], Arrangement::Contiguous, &call, &what);
                start += len;
            }
            let memory = self.backend.memory(p, &self.state, slot);
            let counters = self.backend.counters(&self.state, slot);
            self.bystanders.push((slot, memory, counters));
        }
    }

    fn expect(&mut self, holds: bool, otherwise: String) {
        if !holds {
            self.checks.push(Err(otherwise));
        }
    }

    fn call(&mut self, i: usize) {
        let (case, lens) = (self.case, &self.case.calls[i]);
        let shape = CallShape::new(case.batch, lens);
        let p = &case.problem;
        let call = self.assemble(&shape, lens);
        let idle: Vec<_> = (0..lens.len())
            .filter(|&b| lens[b] == 0)
            .map(|b| self.slot(b))
            .map(|s| (s, self.backend.memory(p, &self.state, s)))
            .collect();
        let what = format!("call {i}");
        let Some(out) = self.run(&shape.lead, case.arrangement, &call, &what) else { return };
        self.gather(i, &shape, lens, &out);
        for (slot, before) in idle {
            let same = same_bits(&before, &self.backend.memory(p, &self.state, slot));
            self.expect(same, format!("call {i}: an empty sequence changed slot {slot}"));
        }
        if case.flush_after.contains(&i) && !self.broken {
            let result = self.backend.flush(p, &mut self.state, &call.slots());
            self.expect(result.is_ok(), format!("flush after call {i}: {result:?}"));
            self.findings(&format!("flush after call {i}"));
        }
    }

    /// Makes a call; none where the backend refused it.
    fn run(
        &mut self,
        lead: &[usize],
        how: Arrangement,
        call: &Call<'_, T>,
        what: &str,
    ) -> Option<OutputBuffers<T>> {
        if self.broken {
            return None;
        }
        let (p, asked) = (&self.case.problem, self.case.asked);
        let (heads, dv) = (p.heads(), p.value_dim());
        let mut out = OutputBuffers::with_margin(lead, heads, dv, how, asked, B::MARGIN);
        let result = self.backend.call(p, call, &self.gate, &mut self.state, &mut out);
        if let Err(error) = result {
            self.broken = true;
            self.expect(false, format!("{what}: {error}"));
        }
        self.findings(what);
        if self.broken {
            return None;
        }
        self.expect(out.guards_intact(), format!("{what}: wrote outside of its outputs"));
        Some(out)
    }

    fn findings(&mut self, what: &str) {
        let findings = self.backend.findings(&mut self.state);
        self.checks.extend(findings.into_iter().map(|f| Err(format!("{what}: {f}"))));
    }

    /// Buffers of NaN for q, k and v.
    fn buffers(&self, lead: &[usize], how: Arrangement) -> [Strided<T>; 3] {
        let p = &self.case.problem;
        let (hq, hkv) = (p.heads(), p.kv_heads());
        [(hq, p.key_dim()), (hkv, p.key_dim()), (hkv, p.value_dim())].map(|(heads, dim)| {
            Strided::with_margin(&[lead, &[heads, dim]].concat(), how, f32::NAN, B::MARGIN)
        })
    }

    /// Arguments of one call; everything that belongs to no token is NaN.
    fn assemble(&self, shape: &CallShape, lens: &[usize]) -> Call<'a, T> {
        let case = self.case;
        let [q, k, v] = self.buffers(&shape.lead, case.arrangement);
        let sum = |b: usize| lens[..b].iter().sum::<usize>() as i32;
        let rope = case.rope.zip(self.tables).map(|(rotation, (cos, sin))| CallRope {
            rotation,
            cos,
            sin,
            positions: self.call_positions(shape, lens),
        });
        let mut call = Call {
            q,
            k,
            v,
            batch: case.batch,
            lens: lens.iter().map(|&n| n as i32).collect(),
            ranges: shape.ranges(lens),
            cu: (0..=lens.len()).map(sum).collect(),
            slots: case.slots.as_ref().map(|(slots, _)| slots.clone()),
            rope,
        };
        for (b, &len) in lens.iter().enumerate() {
            for t in 0..len {
                let at = shape.token(b, t);
                fill(&case.problem, &mut call, &at, &self.streams[b], self.seen[b] + t);
            }
        }
        call
    }

    /// Explicit table rows of one call; padding gets one that must not be read.
    fn call_positions(&self, shape: &CallShape, lens: &[usize]) -> Option<Vec<i64>> {
        let kind = self.case.rope?.positions;
        if kind == Positions::Continued {
            return None;
        }
        let shared = kind == Positions::Shared && shape.lead.len() == 2;
        let count = if shared { shape.lead[1] } else { shape.lead.iter().product() };
        let mut list = vec![i64::MIN; count];
        for (b, &len) in lens.iter().enumerate() {
            for t in 0..len {
                let at = shape.token(b, t);
                let i = if shared || at.len() == 1 {
                    at[at.len() - 1]
                } else {
                    at[0] * shape.lead[1] + at[1]
                };
                list[i] = self.positions[b][self.seen[b] + t];
            }
        }
        Some(list)
    }

    fn gather(&mut self, i: usize, shape: &CallShape, lens: &[usize], out: &OutputBuffers<T>) {
        let heads = self.case.problem.heads();
        for (b, &len) in lens.iter().enumerate() {
            for t in 0..len {
                let at = shape.token(b, t);
                for h in 0..heads {
                    for (to, (_, buffer)) in self.gathered[b].main.iter_mut().zip(out.named()) {
                        let row = buffer.map(|x| widen(x.row(&[&at[..], &[h]].concat())));
                        to.extend(row.into_iter().flatten());
                    }
                    let lse = out.lse.as_ref().map(|x| f64::from(x.get(&shape.lse(b, t, h))));
                    self.gathered[b].lse.extend(lse);
                }
            }
            self.seen[b] += len;
        }
        let clean = (0..lens.len()).all(|b| {
            let rows = shape.padding(b, lens[b]).flat_map(|t| (0..heads).map(move |h| (t, h)));
            { rows }.all(|(t, h)| {
                let zero = |x: &Strided<T>| widen(x.row(&[b, t, h])).iter().all(|&x| x == 0.0);
                let minus = |x: &Strided<f32>| x.get(&[b, h, t]) == f32::NEG_INFINITY;
                out.named().iter().all(|(_, x)| x.is_none_or(zero))
                    && out.lse.as_ref().is_none_or(minus)
            })
        });
        self.expect(clean, format!("call {i}: padded rows are not 0 (log-sum-exp −∞)"));
    }

    fn check_state(&mut self) {
        for (slot, memory, counters) in std::mem::take(&mut self.bystanders) {
            let now = self.backend.memory(&self.case.problem, &self.state, slot);
            self.expect(same_bits(&memory, &now), format!("untouched slot {slot}: M or z changed"));
            let now = self.backend.counters(&self.state, slot);
            self.expect(counters == now, format!("untouched slot {slot}: {now:?}"));
        }
    }

    /// Compares every sequence with the reference's run over the uncut stream.
    fn check_outputs(&mut self) {
        let p = self.case.problem;
        for b in 0..self.case.sequences() {
            let (want, state) = self.reference(b);
            let slot = self.slot(b);
            let counters = self.backend.counters(&self.state, slot);
            let expected = [state.tokens(0), state.committed(0), state.open_len(0) as u64];
            self.expect(
                counters == expected,
                format!("sequence {b}: counters {counters:?}, {expected:?} expected"),
            );
            let mut got = std::mem::take(&mut self.gathered[b]);
            [got.m, got.z] = self.backend.memory(&p, &self.state, slot);
            let tolerances = match B::PRECISION {
                Precision::F32 => Tolerances::exact(p.dtype()),
                Precision::TensorCore => {
                    let plain = self.plain(b);
                    let what = format!("sequence {b}: z of rounded keys");
                    let shape = [p.kv_heads(), p.key_dim()];
                    let limit = ROUNDED_SUM_TOLERANCE;
                    let r = relative_rms(&what, &got.z, &plain.z, &shape, limit);
                    self.checks.push(r.map(|rms| ("z of rounded keys", rms)));
                    Tolerances::tensor_core(self.case, state.committed(0), &want, &plain)
                }
            };
            self.compare(b, &got, &want, &tolerances);
        }
    }

    fn compare(&mut self, b: usize, got: &Results, want: &Results, limits: &Tolerances) {
        let (p, asked) = (&self.case.problem, self.case.asked);
        let mut check = |name, result: std::result::Result<f64, String>| {
            let result = result.map_err(|e| format!("sequence {b}: {e}"));
            self.checks.push(result.map(|rms| (name, rms)));
        };
        let rows = [self.case.tokens(b), p.heads(), p.value_dim()];
        // A flush starts a segment where it likes.
        let segment = self.case.flush_after.is_empty().then_some(p.segment_len());
        let axes = |shape| Axes::tokens(shape, segment);
        for (i, asked) in [true, asked.a_dot, asked.a_mem].into_iter().enumerate() {
            if asked {
                let (got, want) = (&got.main[i], &want.main[i]);
                check(MAIN[i], relative_rms(MAIN[i], got, want, axes(&rows), limits.main[i]));
            }
        }
        if asked.lse {
            check("lse", log_rms("lse", &got.lse, &want.lse, axes(&rows[..2]), limits.lse));
        }
        let memory = [p.kv_heads(), p.key_dim(), p.value_dim()];
        check("M", relative_rms("M", &got.m, &want.m, Axes::memory(&memory), limits.m));
        check("z", relative_rms("z", &got.z, &want.z, Axes::memory(&memory[..2]), limits.z));
    }

    /// Tokens of sequence `b` from flush point to flush point, and whether a flush follows.
    fn runs(&self, b: usize) -> Vec<(std::ops::Range<usize>, bool)> {
        let case = self.case;
        let mut start = 0;
        (case.flush_after.iter().copied().chain([case.calls.len() - 1]))
            .map(|last| {
                let end: usize = case.calls[..=last].iter().map(|c| c[b]).sum();
                let range = start..end;
                start = end;
                (range, case.flush_after.contains(&last))
            })
            .collect()
    }

    /// The reference over sequence `b` alone: one call from flush point to flush point.
    fn reference(&self, b: usize) -> (Results, reference::State) {
        let p = &self.case.problem;
        let mut state = reference::State::new(p, 1).unwrap();
        let mut want = Results::default();
        for (range, flush) in self.runs(b) {
            let (len, heads) = (range.len(), p.heads());
            let stream = self.streams[b].slice(range.clone());
            let mut inputs = stream.inputs();
            if let (Some(rotation), Some((cos, sin))) = (&self.case.rope, self.tables) {
                inputs = inputs.rope(rope(rotation, cos, sin, Some(&self.positions[b][range])));
            }
            let out = reference::prefill(p, &inputs, &self.gate, &mut state).expect("reference");
            for (to, from) in want.main.iter_mut().zip([out.o, out.a_dot, out.a_mem]) {
                to.extend(from);
            }
            want.lse.extend((0..len * heads).map(|i| out.lse[(i % heads) * len + i / heads]));
            if flush {
                state.flush(p, &[0]).expect("reference");
            }
        }
        (want.m, want.z) = (state.m.clone(), state.z.clone());
        (want, state)
    }

    /// The plain implementation over the same.
    fn plain(&self, b: usize) -> Results {
        let mut plain = Plain::new(&self.case.problem);
        let mut results = Results::default();
        for (range, flush) in self.runs(b) {
            let stream = self.streams[b].slice(range.clone());
            let positions = &self.positions[b][range];
            let rows = (self.case.rope.zip(self.tables)).map(|(rotation, (cos, sin))| Rows {
                rotation,
                cos,
                sin,
                positions,
            });
            let out = plain.run(&stream, rows, &self.gate);
            for (to, from) in results.main.iter_mut().zip([out.o, out.a_dot, out.a_mem]) {
                to.extend(from);
            }
            results.lse.extend(out.lse);
            if flush {
                plain.flush();
            }
        }
        (results.m, results.z) = (plain.m, plain.z);
        results
    }
}

/// Puts token `t` of a stream into a call's buffers, at leading indices `at`.
fn fill<T: Element>(p: &Problem, call: &mut Call<'_, T>, at: &[usize], from: &Stream<T>, t: usize) {
    for (buffer, data, heads, dim) in [
        (&mut call.q, &from.q, p.heads(), p.key_dim()),
        (&mut call.k, &from.k, p.kv_heads(), p.key_dim()),
        (&mut call.v, &from.v, p.kv_heads(), p.value_dim()),
    ] {
        for h in 0..heads {
            buffer.set_row(&[at, &[h]].concat(), &data[(t * heads + h) * dim..][..dim]);
        }
    }
}

fn stream<T: Element>(case: &Case, sequence: usize) -> Stream<T> {
    let values = case.values;
    let seed = case.seed * 16 + sequence as u64;
    Stream::from_fn(&case.problem, case.tokens(sequence), seed, |which, x| {
        let i = "qkv".find(which).expect("one of q, k, v");
        values.scale[i] * x + values.shift[i]
    })
}

/// Table row of every token of every sequence.
fn positions(case: &Case) -> Vec<Vec<i64>> {
    let kind = case.rope.map_or(Positions::Continued, |r| r.positions);
    (0..case.sequences())
        .map(|b| {
            let of_call = |(i, lens): (usize, &Vec<usize>)| {
                let shape = CallShape::new(case.batch, lens);
                (0..lens[b]).map(move |t| match (kind, &shape.token(b, t)[..]) {
                    (Positions::Continued, _) => None,
                    (Positions::Shared, [_, t]) => Some((i * 37 + t * 3) % TABLE_ROWS),
                    // Packed tokens share no index, so there the list is per token as well.
                    (Positions::Shared, _) => Some((i * 37 + t * 3) % TABLE_ROWS),
                    (Positions::PerToken, _) => Some((i * 131 + b * 29 + t * 17) % TABLE_ROWS),
                })
            };
            let all = case.calls.iter().enumerate().flat_map(of_call);
            all.enumerate().map(|(t, given)| given.unwrap_or(t) as i64).collect()
        })
        .collect()
}

fn same_bits(a: &[Vec<f64>; 2], b: &[Vec<f64>; 2]) -> bool {
    let bits =
        |x: &[Vec<f64>; 2]| -> Vec<u64> { x.iter().flatten().map(|x| x.to_bits()).collect() };
    bits(a) == bits(b)
}
