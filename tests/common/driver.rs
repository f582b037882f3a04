//! Runs a case through a backend, call by call, and through the float64 reference, one sequence at
//! a time and uncut, and compares everything.

use std::collections::BTreeMap;

use infini_attn::{DType, Element, Inputs, Rope, TensorView, reference};

use super::backend::Backend;
use super::buffers::{Arrangement, OutputBuffers, Strided};
use super::cases::{Batch, Case, Gate, Positions, Rotation};
use super::metric::{log_rms, relative_rms};
use super::stream::{Stream, normals, rope_tables};
use super::{WithType, widen, with_type};

/// Relative RMS that the outputs of a dtype may be off.
pub fn output_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1e-3,
        DType::BF16 => 4e-3,
        _ => 1e-5,
    }
}

/// Relative RMS that M, z and the log-sum-exp may be off, for every dtype.
pub const STATE_TOLERANCE: f64 = 1e-5;

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
    /// Prints the figures and fails if any case did.
    pub fn finish(self, backend: &str) -> Self {
        println!("{backend}: {} cases ran, refused: {:?}", self.ran, self.refused);
        for ((tensor, dtype), (rms, case)) in &self.worst {
            println!("  {tensor} {dtype}: largest relative RMS error {rms:.1e} ({case})");
        }
        let failures = &self.failures;
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
        self
    }
}

/// Runs every case that the backend does not refuse.
pub fn run_cases<B: Backend>(backend: &B, cases: &[Case]) -> Summary {
    let mut summary = Summary::default();
    for case in cases {
        if let Some(reason) = backend.refuses(case) {
            *summary.refused.entry(reason).or_default() += 1;
            continue;
        }
        summary.ran += 1;
        let dtype = case.problem.dtype();
        for result in with_type(dtype, Job { backend, case }) {
            match result {
                Ok((tensor, rms)) => {
                    let worst = summary.worst.entry((tensor, dtype.to_string())).or_default();
                    if rms >= worst.0 {
                        *worst = (rms, case.name.clone());
                    }
                }
                Err(failure) => summary.failures.push(format!("{}: {failure}", case.name)),
            }
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
        let mut run = Run::<T, B>::new(self.backend, self.case);
        (0..self.case.calls.len()).for_each(|i| run.call(i));
        run.check_state();
        run.check_outputs();
        run.checks
    }
}

/// Outputs of one sequence, gathered over the calls.
#[derive(Default)]
struct Gathered {
    /// o, a_dot, a_mem: [tokens, Hq, Dv].
    main: [Vec<f64>; 3],
    /// [tokens, Hq].
    lse: Vec<f64>,
}

struct Run<'a, T, B: Backend> {
    backend: &'a B,
    case: &'a Case,
    gate: Vec<f32>,
    tables: Option<(Vec<f32>, Vec<f32>)>,
    streams: Vec<Stream<T>>,
    /// Table row of every token, per sequence.
    positions: Vec<Vec<i64>>,
    state: B::State,
    /// Slots that no sequence uses, with their M and z.
    bystanders: Vec<(usize, [Vec<f64>; 2], [u64; 3])>,
    seen: Vec<usize>,
    gathered: Vec<Gathered>,
    checks: Vec<Check>,
}

/// Rows of the rotation tables; more than any case has tokens.
const TABLE_ROWS: usize = 1024;

impl<'a, T: Element, B: Backend> Run<'a, T, B> {
    fn new(backend: &'a B, case: &'a Case) -> Self {
        let p = &case.problem;
        let gate = match case.gate {
            Gate::Normal => normals(case.seed, p.heads()),
            Gate::Of(list) => list.iter().copied().cycle().take(p.heads()).collect(),
        };
        let streams = (0..case.sequences()).map(|b| stream(case, b)).collect::<Vec<_>>();
        let slots = case.slots.as_ref().map_or(case.sequences(), |(_, n)| *n);
        let mut run = Self {
            backend,
            case,
            gate,
            tables: case.rope.map(|r| rope_tables(TABLE_ROWS, r.channels, r.magnitude)),
            streams,
            positions: positions(case),
            state: backend.new_state(p, slots),
            bystanders: vec![],
            seen: vec![0; case.sequences()],
            gathered: (0..case.sequences()).map(|_| Gathered::default()).collect(),
            checks: vec![],
        };
        run.fill_bystanders(slots);
        run
    }

    fn slot(&self, sequence: usize) -> usize {
        self.case.slots.as_ref().map_or(sequence, |(slots, _)| slots[sequence])
    }

    /// Gives every slot that the case leaves alone a memory and an open segment of its own.
    fn fill_bystanders(&mut self, slots: usize) {
        let p = &self.case.problem;
        let used: Vec<usize> = (0..self.case.sequences()).map(|b| self.slot(b)).collect();
        for slot in (0..slots).filter(|s| !used.contains(s)) {
            let stream = Stream::<T>::normal(p, p.segment_len() + 1, 900 + slot as u64);
            let how = Arrangement::Contiguous;
            let mut out =
                OutputBuffers::new(&[1, 1], p.heads(), p.value_dim(), how, self.case.asked);
            for t in 0..stream.tokens {
                // Token by token, so that every entry point serves it.
                let token = stream.slice(t..t + 1);
                let inputs = token.inputs().slots(std::slice::from_ref(&slot));
                let result =
                    self.backend.call(p, &inputs, 1, &self.gate, &mut self.state, &mut out);
                self.expect(result.is_ok(), format!("bystander slot {slot}: {result:?}"));
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
        let [q, k, v] = self.assemble(&shape, lens);
        let idle: Vec<_> = (0..lens.len())
            .filter(|&b| lens[b] == 0)
            .map(|b| self.slot(b))
            .map(|s| (s, self.backend.memory(p, &self.state, s)))
            .collect();
        let lens32: Vec<i32> = lens.iter().map(|&n| n as i32).collect();
        let cu: Vec<i32> =
            (0..=lens.len()).map(|b| lens[..b].iter().sum::<usize>() as i32).collect();
        let slots: Vec<usize> = (0..lens.len()).map(|b| self.slot(b)).collect();
        let positions = self.call_positions(&shape, lens);
        let mut inputs = Inputs::new(q.view(), k.view(), v.view());
        inputs = match case.batch {
            Batch::Full => inputs,
            Batch::Padded => inputs.seq_lens(&lens32),
            Batch::Packed => inputs.cu_seqlens(&cu),
        };
        if case.slots.is_some() {
            inputs = inputs.slots(&slots);
        }
        if let (Some(rotation), Some((cos, sin))) = (&case.rope, &self.tables) {
            inputs = inputs.rope(rope(rotation, cos, sin, positions.as_deref()));
        }
        let (heads, dv) = (p.heads(), p.value_dim());
        let mut out = OutputBuffers::new(&shape.lead, heads, dv, case.arrangement, case.asked);
        let longest = lens.iter().copied().max().unwrap_or(0);
        let result = self.backend.call(p, &inputs, longest, &self.gate, &mut self.state, &mut out);
        if let Err(error) = result {
            return self.expect(false, format!("call {i}: {error}"));
        }
        self.expect(out.guards_intact(), format!("call {i}: wrote outside of its outputs"));
        self.gather(i, &shape, lens, &out);
        for (slot, before) in idle {
            let same = same_bits(&before, &self.backend.memory(p, &self.state, slot));
            self.expect(same, format!("call {i}: an empty sequence changed slot {slot}"));
        }
        if case.flush_after.contains(&i) {
            let result = self.backend.flush(p, &mut self.state, &slots);
            self.expect(result.is_ok(), format!("flush after call {i}: {result:?}"));
        }
    }

    /// q, k and v of one call; everything that belongs to no token is NaN.
    fn assemble(&self, shape: &CallShape, lens: &[usize]) -> [Strided<T>; 3] {
        let p = &self.case.problem;
        let [hq, hkv] = [p.heads(), p.kv_heads()];
        [('q', hq, p.key_dim()), ('k', hkv, p.key_dim()), ('v', hkv, p.value_dim())].map(
            |(which, heads, dim)| {
                let full = [&shape.lead[..], &[heads, dim]].concat();
                let mut buffer = Strided::new(&full, self.case.arrangement, f32::NAN);
                for (b, &len) in lens.iter().enumerate() {
                    let stream = &self.streams[b];
                    let data = match which {
                        'q' => &stream.q,
                        'k' => &stream.k,
                        _ => &stream.v,
                    };
                    for t in 0..len {
                        for h in 0..heads {
                            let row = &data[((self.seen[b] + t) * heads + h) * dim..][..dim];
                            buffer.set_row(&[&shape.token(b, t)[..], &[h]].concat(), row);
                        }
                    }
                }
                buffer
            },
        )
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
        if self.case.batch == Batch::Padded {
            let clean = (0..lens.len()).all(|b| {
                (lens[b]..shape.lead[1]).all(|t| {
                    (0..heads).all(|h| {
                        let zero =
                            |x: &Strided<T>| widen(x.row(&[b, t, h])).iter().all(|&x| x == 0.0);
                        out.named().iter().all(|(_, x)| x.is_none_or(zero))
                            && (out.lse.as_ref())
                                .is_none_or(|x| x.get(&[b, h, t]) == f32::NEG_INFINITY)
                    })
                })
            });
            self.expect(clean, format!("call {i}: padded rows are not 0 (log-sum-exp −∞)"));
        }
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
            let tolerance = output_tolerance(p.dtype());
            let shape = [self.case.tokens(b), p.heads(), p.value_dim()];
            let got = std::mem::take(&mut self.gathered[b]);
            let asked = self.case.asked;
            for (i, (name, asked)) in [("o", true), ("a_dot", asked.a_dot), ("a_mem", asked.a_mem)]
                .into_iter()
                .enumerate()
            {
                if asked {
                    let what = format!("sequence {b}: {name}");
                    let r = relative_rms(&what, &got.main[i], &want.main[i], &shape, tolerance);
                    self.checks.push(r.map(|rms| (name, rms)));
                }
            }
            if asked.lse {
                let what = format!("sequence {b}: lse");
                let r = log_rms(&what, &got.lse, &want.lse, &shape[..2], STATE_TOLERANCE);
                self.checks.push(r.map(|rms| ("lse", rms)));
            }
            let [m, z] = self.backend.memory(&p, &self.state, slot);
            let shape = [p.kv_heads(), p.key_dim(), p.value_dim()];
            for (name, got, want, shape) in
                [("M", &m, &state.m, &shape[..]), ("z", &z, &state.z, &shape[..2])]
            {
                let what = format!("sequence {b}: {name}");
                let r = relative_rms(&what, got, want, shape, STATE_TOLERANCE);
                self.checks.push(r.map(|rms| (name, rms)));
            }
        }
    }

    /// The reference over sequence `b` alone: one call from flush point to flush point.
    fn reference(&self, b: usize) -> (Gathered, reference::State) {
        let (case, p) = (self.case, &self.case.problem);
        let mut state = reference::State::new(p, 1);
        let mut want = Gathered::default();
        let mut start = 0;
        let ends = case.flush_after.iter().copied().chain([case.calls.len() - 1]);
        for last in ends {
            let end: usize = case.calls[..=last].iter().map(|c| c[b]).sum();
            let stream = self.streams[b].slice(start..end);
            let mut inputs = stream.inputs();
            let positions = &self.positions[b][start..end];
            if let (Some(rotation), Some((cos, sin))) = (&case.rope, &self.tables) {
                inputs = inputs.rope(rope(rotation, cos, sin, Some(positions)));
            }
            let out = reference::prefill(p, &inputs, &self.gate, &mut state).expect("reference");
            for (to, from) in want.main.iter_mut().zip([out.o, out.a_dot, out.a_mem]) {
                to.extend(from);
            }
            let (len, heads) = (end - start, p.heads());
            want.lse.extend((0..len * heads).map(|i| out.lse[(i % heads) * len + i / heads]));
            if case.flush_after.contains(&last) {
                state.flush(p, &[0]).expect("reference");
            }
            start = end;
        }
        (want, state)
    }
}

fn stream<T: Element>(case: &Case, sequence: usize) -> Stream<T> {
    let values = case.values;
    let seed = case.seed * 16 + sequence as u64;
    Stream::from_fn(&case.problem, case.tokens(sequence), seed, |which, x| {
        let shift = values.shift["qkv".find(which).expect("one of q, k, v")];
        values.scale * x + shift
    })
}

/// Table row of every token of every sequence.
fn positions(case: &Case) -> Vec<Vec<i64>> {
    let kind = case.rope.map_or(Positions::Continued, |r| r.positions);
    (0..case.sequences())
        .map(|b| {
            let of_call = |(i, len): (usize, usize)| {
                (0..len).map(move |t| match kind {
                    Positions::Continued => None,
                    // Packed tokens share no index, so there the list is per token as well.
                    Positions::Shared => Some((i * 37 + t * 3) % TABLE_ROWS),
                    Positions::PerToken => Some((i * 131 + b * 29 + t * 17) % TABLE_ROWS),
                })
            };
            let all = case.calls.iter().map(|c| c[b]).enumerate().flat_map(of_call);
            all.enumerate().map(|(t, given)| given.unwrap_or(t) as i64).collect()
        })
        .collect()
}

fn rope<'a>(
    rotation: &Rotation,
    cos: &'a [f32],
    sin: &'a [f32],
    positions: Option<&'a [i64]>,
) -> Rope<'a> {
    let shape = [TABLE_ROWS, rotation.channels / 2];
    let table = |data| TensorView::new(data, &shape).expect("a table of this shape");
    let rope = Rope::new(table(cos), table(sin)).interleaved(rotation.interleaved);
    match positions {
        Some(list) => rope.positions(list),
        None => rope,
    }
}

fn same_bits(a: &[Vec<f64>; 2], b: &[Vec<f64>; 2]) -> bool {
    let bits =
        |x: &[Vec<f64>; 2]| -> Vec<u64> { x.iter().flatten().map(|x| x.to_bits()).collect() };
    bits(a) == bits(b)
}

/// Leading extents of a call's tensors.
struct CallShape {
    /// [B, T] or [total].
    lead: Vec<usize>,
    /// Packed: first row of every sequence.
    first: Vec<usize>,
}

impl CallShape {
    fn new(batch: Batch, lens: &[usize]) -> Self {
        let longest = lens.iter().copied().max().unwrap_or(0);
        let lead = match batch {
            Batch::Full => vec![lens.len(), longest],
            Batch::Padded => vec![lens.len(), longest + 2],
            Batch::Packed => vec![lens.iter().sum()],
        };
        let first = (0..lens.len()).map(|b| lens[..b].iter().sum()).collect();
        Self { lead, first }
    }

    fn token(&self, b: usize, t: usize) -> Vec<usize> {
        if self.lead.len() == 2 { vec![b, t] } else { vec![self.first[b] + t] }
    }

    fn lse(&self, b: usize, t: usize, h: usize) -> Vec<usize> {
        if self.lead.len() == 2 { vec![b, h, t] } else { vec![h, self.first[b] + t] }
    }
}
