//! Runs a case through a backend, call by call, and through the float64 reference, one sequence at
//! a time and uncut, and compares everything.

use std::collections::BTreeMap;

use infini_attn::{Element, MAX_DECODE_TOKENS, reference};
use rayon::prelude::*;

use super::backend::Backend;
use super::buffers::{Arrangement, OutputBuffers, Strided};
use super::call::{Call, CallShape, rope};
use super::cases::{Batch, Case};
use super::data::{Data, fill, tables};
use super::metric::{Axes, log_rms, relative_rms};
use super::plain::{Plain, Rows};
use super::stream::Stream;
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
    pub fn add(&mut self, case: &Case, checks: Vec<Check>) {
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
pub type Check = std::result::Result<(&'static str, f64), String>;

struct Job<'a, B> {
    backend: &'a B,
    case: &'a Case,
}

impl<B: Backend> WithType for Job<'_, B> {
    type Output = Vec<Check>;

    fn run<T: Element>(self) -> Vec<Check> {
        let tables = tables(self.case);
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
    data: Data<'a, T>,
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
        let slots = case.slots.as_ref().map_or(case.sequences(), |(_, n)| *n);
        Self {
            backend,
            case,
            data: Data::new(case, tables, B::MARGIN),
            state: backend.new_state(case, slots),
            bystanders: vec![],
            seen: vec![0; case.sequences()],
            gathered: (0..case.sequences()).map(|_| Results::default()).collect(),
            checks: vec![],
            broken: false,
        }
    }

    /// Gives every slot that the case leaves alone a memory and an open segment of its own.
    fn fill_bystanders(&mut self) {
        let p = &self.case.problem;
        let slots = self.case.slots.as_ref().map_or(self.case.sequences(), |(_, n)| *n);
        let used: Vec<usize> = (0..self.case.sequences()).map(|b| self.data.slot(b)).collect();
        for slot in (0..slots).filter(|s| !used.contains(s)) {
            let stream = Stream::<T>::normal(p, p.segment_len() + 1, 900 + slot as u64);
            let (mut start, n) = (0, p.segment_len());
            while start < stream.tokens {
                // Calls that every entry point serves.
                let len = MAX_DECODE_TOKENS.min(n - start % n).min(stream.tokens - start);
                let [q, k, v] = self.data.buffers(&[1, len], Arrangement::Contiguous);
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
        let call = self.data.assemble(&shape, lens, &self.seen);
        let idle: Vec<_> = (0..lens.len())
            .filter(|&b| lens[b] == 0)
            .map(|b| self.data.slot(b))
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
        let result = self.backend.call(p, call, &self.data.gate, &mut self.state, &mut out);
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
            let slot = self.data.slot(b);
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

    /// The reference over sequence `b` alone: one call from flush point to flush point.
    fn reference(&self, b: usize) -> (Results, reference::State) {
        let p = &self.case.problem;
        let mut state = reference::State::new(p, 1).unwrap();
        let mut want = Results::default();
        for (range, flush) in self.data.runs(b) {
            let (len, heads) = (range.len(), p.heads());
            let stream = self.data.streams[b].slice(range.clone());
            let mut inputs = stream.inputs();
            if let (Some(rotation), Some((cos, sin))) = (&self.case.rope, self.data.tables) {
                inputs =
                    inputs.rope(rope(rotation, cos, sin, Some(&self.data.positions[b][range])));
            }
            let out =
                reference::prefill(p, &inputs, &self.data.gate, &mut state).expect("reference");
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
        for (range, flush) in self.data.runs(b) {
            let stream = self.data.streams[b].slice(range.clone());
            let positions = &self.data.positions[b][range];
            let rows = (self.case.rope.zip(self.data.tables)).map(|(rotation, (cos, sin))| Rows {
                rotation,
                cos,
                sin,
                positions,
            });
            let out = plain.run(&stream, rows, &self.data.gate);
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

fn same_bits(a: &[Vec<f64>; 2], b: &[Vec<f64>; 2]) -> bool {
    let bits =
        |x: &[Vec<f64>; 2]| -> Vec<u64> { x.iter().flatten().map(|x| x.to_bits()).collect() };
    bits(a) == bits(b)
}
