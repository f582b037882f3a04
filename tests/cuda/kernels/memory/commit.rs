//! commit: open segments into (M, z), in a pool of states.

use bytemuck::Zeroable;
use half::{bf16, f16};
use infini_attn::Element;
use infini_attn::cuda::params::{
    INFINI_STATUS_LENGTH, INFINI_STATUS_SLOT, InfiniCommit, InfiniCounters, InfiniExchange,
    InfiniProblem, InfiniSequence, InfiniSequences, InfiniState,
};
use ptxsim::Report;

use super::fixture::{HEADS, Random, check_cost, check_snapshot, kernel, launch};
use super::fixture::{open_rows, problem, rows_of};
use super::model::{Memory, Policy, mean_sigma, rounded_sigma, sigma};
use super::{DIMS, EXACT, POLICIES, SIZES, memory_tolerance};
use crate::common::metric::relative_rms;
use crate::common::simulator::Simulator;
use crate::common::{narrow, widen};

/// A pool of states on the device, and what the host knows of it.
struct Pool<T> {
    sim: Simulator,
    dims: (usize, usize),
    problem: InfiniProblem,
    m: Vec<f32>,
    z: Vec<f32>,
    k: Vec<T>,
    v: Vec<T>,
    counters: Vec<InfiniCounters>,
    state: InfiniState,
    exchange: InfiniExchange,
}

/// How the sequences of a launch name their slots.
enum Named<'a> {
    Table(&'a [i32]),
    Inline(&'a [i32]),
    /// Sequence b is slot b.
    InOrder(usize),
}

fn counters(committed: usize, open: usize) -> InfiniCounters {
    InfiniCounters {
        tokens: (committed + open) as u64,
        committed: committed as u64,
        open_len: open as u32,
        ..InfiniCounters::default()
    }
}

/// M as operands: T, with a scale per 32 columns.
fn snapshot<T: Element>(m: &[f32], columns: usize) -> (Vec<T>, Vec<f32>) {
    let groups = columns / 32;
    let mut top = vec![0.0f32; groups];
    for row in m.chunks(columns) {
        row.iter().enumerate().for_each(|(c, x)| top[c / 32] = top[c / 32].max(x.abs()));
    }
    let scale = |&t: &f32| if t > 0.0 { (-t.log2().floor()).exp2() } else { 1.0 };
    let scales: Vec<f32> = top.iter().map(scale).collect();
    let scaled: Vec<f32> =
        m.iter().enumerate().map(|(i, x)| x * scales[i % columns / 32]).collect();
    (narrow(&scaled), scales)
}

impl<T: Element> Pool<T> {
    /// A slot per element of `counters`; an empty one holds NaN.
    fn new(
        dims: (usize, usize),
        problem: InfiniProblem,
        counters: Vec<InfiniCounters>,
        (k, v): ((f32, f32), (f32, f32)),
    ) -> Self {
        let (dk, dv) = dims;
        let (n, slots) = (problem.segment_len as usize, counters.len());
        let mut sim = Simulator::new();
        let mut random = Random::new(11 + dk as u64 * 1000 + dv as u64);
        let (mut m, mut z, mut forms, mut scales) = (vec![], vec![], vec![], vec![]);
        for counter in &counters {
            for _ in 0..HEADS {
                if counter.committed == 0 {
                    m.extend(vec![f32::NAN; dk * dv]);
                    z.extend(vec![f32::NAN; dk]);
                    forms.extend(narrow::<T>(&vec![f32::NAN; dk * dv]));
                    scales.extend(vec![f32::NAN; dv / 32]);
                    continue;
                }
                // What `committed` tokens like these leave behind, roughly.
                let tokens = counter.committed as f32;
                let sum = tokens * mean_sigma(k);
                let deviation = mean_sigma(k) * tokens.sqrt() * v.1;
                let values = random.normal(dk * dv, sum * v.0, deviation);
                let (form, scale) = snapshot::<T>(&values, dv);
                let sums = random.normal(dk, sum, sum / 8.0);
                m.extend(values);
                forms.extend(form);
                scales.extend(scale);
                z.extend(sums.iter().map(|x: &f32| x.abs()));
            }
        }
        let lens: Vec<usize> = counters.iter().map(|c| (c.open_len as usize).min(n)).collect();
        let open_k = open_rows::<T>(&mut random, &lens, n, dk, k);
        let open_v = open_rows::<T>(&mut random, &lens, n, dv, v);
        let state = InfiniState {
            memory: sim.upload("memory", &m),
            normalizer: sim.upload("normalizer", &z),
            snapshot: sim.upload("snapshot", &forms),
            snapshot_scale: sim.upload("snapshot_scale", &scales),
            open_k: sim.upload("open_k", &open_k),
            open_k_rotated: 0,
            open_v: sim.upload("open_v", &open_v),
            counters: sim.upload("counters", &counters),
            status: sim.upload("status", &[0u32]),
            slots: slots as i64,
        };
        let (k, v) = (open_k, open_v);
        let exchange = InfiniExchange::default();
        Self { sim, dims, problem, m, z, k, v, counters, state, exchange }
    }

    fn commit(&mut self, named: &Named<'_>, chunk_len: usize, flush: bool) -> Report {
        let (dk, dv) = self.dims;
        let of = |slot: i32| InfiniSequence { slot, ..InfiniSequence::default() };
        let mut sequences = InfiniSequences::zeroed();
        match *named {
            Named::Table(slots) => {
                let table: Vec<InfiniSequence> = slots.iter().map(|&slot| of(slot)).collect();
                sequences.table = self.sim.upload("sequences", &table);
                sequences.count = slots.len() as i32;
            }
            Named::Inline(slots) => {
                sequences.in_line = 1;
                sequences.count = slots.len() as i32;
                slots.iter().enumerate().for_each(|(b, &s)| sequences.inline_sequences[b] = of(s));
            }
            Named::InOrder(count) => sequences.count = count as i32,
        }
        let count = sequences.count as usize;
        let chunks = (self.problem.segment_len as usize).div_ceil(chunk_len);
        self.exchange = InfiniExchange {
            partials: self
                .sim
                .uninitialised::<f32>("partials", count * HEADS * chunks * (dk * dv + dk)),
            head_tickets: self.sim.upload("head_tickets", &vec![0u32; count * HEADS]),
            sequence_tickets: self.sim.upload("sequence_tickets", &vec![0u32; count]),
        };
        let params = InfiniCommit {
            problem: self.problem,
            state: self.state,
            exchange: self.exchange,
            chunks: chunks as i32,
            chunk_len: chunk_len as i32,
            flush: flush.into(),
            reserved: 0,
            sequences,
        };
        let kernel = kernel("commit", T::DTYPE, dk, dv);
        let grid = [chunks, HEADS * dv / kernel.columns, count];
        let report = launch(&mut self.sim, kernel, grid, &params);
        let tickets: Vec<u32> = self.sim.read(self.exchange.head_tickets, count * HEADS);
        assert_eq!(tickets, vec![0; count * HEADS], "tickets of heads");
        let tickets: Vec<u32> = self.sim.read(self.exchange.sequence_tickets, count);
        assert_eq!(tickets, vec![0; count], "tickets of sequences");
        report
    }

    fn status(&self) -> u32 {
        self.sim.read::<u32>(self.state.status, 1)[0]
    }

    /// Checks every slot: those of `committed` hold their open segments, the others what they held.
    fn check(&self, what: &str, committed: &[usize], delta: Option<Policy>) {
        let (dk, dv) = self.dims;
        let n = self.problem.segment_len as usize;
        let slots = self.counters.len();
        let m: Vec<f32> = self.sim.read(self.state.memory, slots * HEADS * dk * dv);
        let z: Vec<f32> = self.sim.read(self.state.normalizer, slots * HEADS * dk);
        let forms: Vec<T> = self.sim.read(self.state.snapshot, slots * HEADS * dk * dv);
        let scales: Vec<f32> = self.sim.read(self.state.snapshot_scale, slots * HEADS * dv / 32);
        let after: Vec<InfiniCounters> = self.sim.read(self.state.counters, slots);
        for (slot, before) in self.counters.iter().enumerate() {
            let what = format!("{what}, slot {slot}");
            let len = if committed.contains(&slot) { before.open_len as usize } else { 0 };
            let (now, empty) = (after[slot], before.committed == 0);
            assert_eq!(now.tokens, before.tokens, "{what}: tokens");
            assert_eq!(now.committed, before.committed + len as u64, "{what}: committed");
            let open = if len > 0 { 0 } else { before.open_len };
            assert_eq!(now.open_len, open, "{what}: open segment");
            for head in 0..HEADS {
                let matrix = slot * HEADS + head;
                let (at, z_at) = (matrix * dk * dv..(matrix + 1) * dk * dv, matrix * dk);
                let (got, got_z) = (&m[at.clone()], &z[z_at..][..dk]);
                let (old, old_z) = (&self.m[at.clone()], &self.z[z_at..][..dk]);
                if len == 0 {
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(bits(got) == bits(old), "{what}: M changed");
                    assert!(bits(got_z) == bits(old_z), "{what}: z changed");
                    continue;
                }
                let mut want = if empty { Memory::new(dk, dv) } else { Memory::of(old, old_z) };
                let s = rounded_sigma::<T>(&rows_of(&self.k, n, dk, slot, head, len));
                let v = rows_of(&self.v, n, dv, slot, head, len);
                want.write(&s, &v, delta.filter(|_| !empty));
                let tolerance = memory_tolerance(T::DTYPE);
                let close = |name: &str, got: &[f32], want: &[f64], columns, tolerance| {
                    let shape = [got.len() / columns, columns];
                    relative_rms(&format!("{what}: {name}"), &widen(got), want, &shape, tolerance)
                        .unwrap_or_else(|e| panic!("{e}"))
                };
                close("z", got_z, &want.z, dk, 1e-4);
                close("M", got, &want.m, dv, tolerance);
                let scales = &scales[matrix * dv / 32..][..dv / 32];
                check_snapshot(&what, got, dv, &forms[at], scales);
            }
        }
    }
}

/// Full, partly filled, empty, never written: a slot of each kind; slot 2 is never named.
fn kinds(n: usize) -> Vec<InfiniCounters> {
    vec![
        counters(4 * n, n / 3),
        counters(0, n),
        counters(n, n),
        counters(3 * n, n),
        counters(2 * n, 0),
        counters(0, 5),
    ]
}

const NORMAL: ((f32, f32), (f32, f32)) = ((0.0, 1.0), (0.2, 1.0));

fn agrees<T: Element>(index: usize, n: usize, chunk_len: usize, schedules: u32) {
    let (dk, dv) = DIMS[index];
    let delta = (index % 4 != 3).then(|| POLICIES[index % 3]);
    let what = format!("{} {dk}x{dv} {delta:?}", T::DTYPE);
    for flush in [false, true] {
        let problem = problem(dk, dv, n, delta.is_some(), delta.unwrap_or(EXACT));
        let mut pool = Pool::<T>::new((dk, dv), problem, kinds(n), NORMAL);
        pool.sim = pool.sim.schedules(schedules);
        let slots = [3, 0, 1, 5, 4];
        let named = if flush { Named::Inline(&slots) } else { Named::Table(&slots) };
        pool.commit(&named, chunk_len, flush);
        let committed: &[usize] = if flush { &[3, 0, 1, 5] } else { &[3, 1] };
        pool.check(&format!("{what}, flush {flush}"), committed, delta);
        assert_eq!(pool.status(), 0, "{what}");
    }
}

#[test]
fn commits_agree_with_the_model_in_bf16() {
    for index in 0..DIMS.len() {
        agrees::<bf16>(index, 150, [64, 128, 192][index % 3], 1);
    }
}

#[test]
fn commits_agree_with_the_model_in_f16() {
    for index in 0..DIMS.len() {
        agrees::<f16>(index, 150, [128, 192, 64][index % 3], 1);
    }
}

#[test]
fn commits_do_not_depend_on_the_order_of_blocks_and_copies() {
    agrees::<bf16>(0, 100, 64, 4);
    agrees::<f16>(4, 70, 64, 4);
}

#[test]
fn what_only_the_device_knows_is_checked() {
    let problem = problem(64, 64, 40, true, EXACT);
    let states = vec![counters(80, 40), counters(40, 41), counters(40, 40)];
    let named: [(Named<'_>, u32, &[usize]); 5] = [
        (Named::InOrder(3), INFINI_STATUS_LENGTH, &[0, 2]),
        (Named::Table(&[2, -2]), INFINI_STATUS_SLOT, &[2]),
        // Padding.
        (Named::Table(&[-1, 2, -1, 0]), 0, &[0, 2]),
        (Named::Inline(&[3, 0]), INFINI_STATUS_SLOT, &[0]),
        (Named::Inline(&[2, 0]), 0, &[0, 2]),
    ];
    for (named, status, committed) in named {
        for flush in [false, true] {
            let mut pool = Pool::<bf16>::new((64, 64), problem, states.clone(), NORMAL);
            pool.commit(&named, 64, flush);
            assert_eq!(pool.status(), status);
            pool.check("indices of the device", committed, Some(EXACT));
        }
    }
}

/// Values and keys far from 1 keep their relative precision.
#[test]
fn sizes_do_not_matter() {
    fn run<T: Element>(sizes: ((f32, f32), (f32, f32))) {
        let problem = problem(64, 64, 100, true, EXACT);
        let states = vec![counters(300, 100), counters(0, 100)];
        let mut pool = Pool::<T>::new((64, 64), problem, states, sizes);
        pool.commit(&Named::InOrder(2), 128, false);
        pool.check(&format!("{}, keys and values {sizes:?}", T::DTYPE), &[0, 1], Some(EXACT));
    }
    for sizes in SIZES {
        run::<f16>(sizes);
        run::<bf16>(sizes);
    }
}

/// M after thirty commits against the exact operator, whose σ is not rounded.
fn drift<T: Element>(delta: bool) {
    const N: usize = 64;
    let problem = problem(64, 64, N, delta, EXACT);
    let mut pool = Pool::<T>::new((64, 64), problem, vec![counters(0, N)], NORMAL);
    let mut want = vec![Memory::new(64, 64); HEADS];
    let mut random = Random::new(1);
    for segment in 0..30 {
        let (k, v) =
            (random.normal(HEADS * N * 64, 0.0, 1.0), random.normal(HEADS * N * 64, 0.2, 1.0));
        (pool.k, pool.v) = (narrow(&k), narrow(&v));
        for (head, want) in want.iter_mut().enumerate() {
            let k = rows_of(&pool.k, N, 64, 0, head, N);
            let s: Vec<f64> = k.iter().map(|&x| sigma(x)).collect();
            let v = rows_of(&pool.v, N, 64, 0, head, N);
            want.write(&s, &v, (delta && segment > 0).then_some(EXACT));
        }
        let write = |sim: &mut Simulator, to, bytes: &[u8]| sim.device.write(to, bytes).unwrap();
        write(&mut pool.sim, pool.state.open_k, bytemuck::cast_slice(&pool.k));
        write(&mut pool.sim, pool.state.open_v, bytemuck::cast_slice(&pool.v));
        let before = counters(segment * N, N);
        write(&mut pool.sim, pool.state.counters, bytemuck::bytes_of(&before));
        pool.commit(&Named::InOrder(1), N, false);
    }
    let got: Vec<f32> = pool.sim.read(pool.state.memory, HEADS * 64 * 64);
    for (head, (got, want)) in got.chunks(64 * 64).zip(want).enumerate() {
        let what = format!("{}, delta {delta}, head {head}", T::DTYPE);
        relative_rms(&what, &widen(got), &want.m, &[64, 64], memory_tolerance(T::DTYPE))
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn memory_is_precise_after_thirty_commits() {
    drift::<bf16>(true);
    drift::<bf16>(false);
    drift::<f16>(true);
    drift::<f16>(false);
}

/// Every byte is moved once, but for the operands that chunks or slices of columns share.
#[test]
fn commits_move_what_they_must() {
    for (dk, dv) in DIMS {
        let problem = problem(dk, dv, 256, true, EXACT);
        let states = vec![counters(256, 256), counters(512, 256)];
        let mut pool = Pool::<bf16>::new((dk, dv), problem, states, NORMAL);
        let report = pool.commit(&Named::InOrder(2), 128, false);
        let slices = dv / kernel("commit", bf16::DTYPE, dk, dv).columns;
        let shared = [("open_k", slices), ("snapshot", 2), ("normalizer", 2 * slices + 1)];
        check_cost(&format!("commit {dk}x{dv}"), &report, &shared);
    }
}
