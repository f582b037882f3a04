//! Arguments of the CUDA backend, without a device: every error of the CPU backend, counters that
//! move as the CPU's do, and what only device memory asks for.

use crate::common::plans::{Recorder, addresses, call, f32s, mirror, problem, run, tensor};
use half::bf16;
use infini_attn::cuda::{
    Call, DecodeOptions, DeviceRope, DeviceTensor, Mirror, Operand, PAD_SLOT, Plan, PrefillOptions,
    Runs, StateLayout, Target, plan_decode, plan_flush, plan_prefill, plan_segment,
};
use infini_attn::{
    DType, Error, Inputs, Outputs, Problem, Result, Rope, State, TensorView, TensorViewMut, decode,
    flush, prefill,
};

/// A tensor as both backends see it.
#[derive(Clone)]
struct Described {
    shape: Vec<usize>,
    strides: Vec<i64>,
}

impl Described {
    fn new(shape: &[usize]) -> Self {
        let strides =
            DeviceTensor::contiguous(DType::F32, shape).expect("shape").strides().to_vec();
        Self { shape: shape.to_vec(), strides }
    }

    fn host<'a, T>(&self, data: &'a [T]) -> TensorView<'a, T> {
        TensorView::strided(data, 0, &self.shape, &self.strides).expect("inside the data")
    }

    fn host_mut<'a, T>(&self, data: &'a mut [T]) -> TensorViewMut<'a, T> {
        TensorViewMut::strided(data, 0, &self.shape, &self.strides).expect("inside the data")
    }

    fn device(&self, dtype: DType) -> DeviceTensor {
        DeviceTensor::strided(dtype, &self.shape, &self.strides).expect("valid")
    }
}

/// The arguments of a call, to be spoilt.
#[derive(Clone)]
struct Arguments {
    q: Described,
    k: Described,
    v: Described,
    gate: usize,
    o: Described,
    lse: Option<Described>,
    a_dot: Option<Described>,
    a_mem: Option<Described>,
    lens: Option<Vec<i32>>,
    cu: Option<Vec<i32>>,
    slots: Option<Vec<usize>>,
    rope: Option<[Described; 2]>,
    positions: Option<Vec<i64>>,
}

impl Arguments {
    /// A valid call of 2 sequences of 3 tokens.
    fn new(p: &Problem) -> Self {
        let of = |heads, dim| Described::new(&[2, 3, heads, dim]);
        let (q, o) = (of(p.heads(), p.key_dim()), of(p.heads(), p.value_dim()));
        Self {
            q,
            k: of(p.kv_heads(), p.key_dim()),
            v: of(p.kv_heads(), p.value_dim()),
            gate: p.heads(),
            lse: Some(Described::new(&[2, p.heads(), 3])),
            a_dot: Some(o.clone()),
            a_mem: Some(o.clone()),
            o,
            lens: None,
            cu: None,
            slots: None,
            rope: None,
            positions: None,
        }
    }

    /// Both as packed tokens.
    fn packed(mut self, p: &Problem, cu: &[i32]) -> Self {
        let of = |heads, dim| Described::new(&[6, heads, dim]);
        (self.q, self.o) = (of(p.heads(), p.key_dim()), of(p.heads(), p.value_dim()));
        (self.k, self.v) = (of(p.kv_heads(), p.key_dim()), of(p.kv_heads(), p.value_dim()));
        self.lse = Some(Described::new(&[p.heads(), 6]));
        (self.a_dot, self.a_mem) = (Some(self.o.clone()), Some(self.o.clone()));
        self.cu = Some(cu.to_vec());
        self
    }

    fn rotated(mut self, rows: usize, half: usize) -> Self {
        self.rope = Some([Described::new(&[rows, half]), Described::new(&[rows, half])]);
        self
    }

    fn on_host(&self, p: &Problem, state: &mut State, decodes: bool) -> Result<()> {
        let (data, table) = (vec![bf16::ONE; 1 << 16], vec![1.0f32; 1 << 12]);
        let mut inputs = Inputs::new(self.q.host(&data), self.k.host(&data), self.v.host(&data));
        if let Some(lens) = &self.lens {
            inputs = inputs.seq_lens(lens);
        }
        if let Some(cu) = &self.cu {
            inputs = inputs.cu_seqlens(cu);
        }
        if let Some(slots) = &self.slots {
            inputs = inputs.slots(slots);
        }
        if let Some([cos, sin]) = &self.rope {
            let mut rope = Rope::new(cos.host(&table), sin.host(&table));
            if let Some(positions) = &self.positions {
                rope = rope.positions(positions);
            }
            inputs = inputs.rope(rope);
        }
        let mut buffers = vec![vec![bf16::ZERO; 1 << 16]; 3];
        let [o, a_dot, a_mem] = &mut buffers[..] else { unreachable!() };
        let mut lse = vec![0.0f32; 1 << 12];
        let mut outputs = Outputs::new(self.o.host_mut(o));
        if let Some(shape) = &self.lse {
            outputs = outputs.lse(shape.host_mut(&mut lse));
        }
        if let Some(shape) = &self.a_dot {
            outputs = outputs.a_dot(shape.host_mut(a_dot));
        }
        if let Some(shape) = &self.a_mem {
            outputs = outputs.a_mem(shape.host_mut(a_mem));
        }
        let entry = if decodes { decode::<bf16> } else { prefill::<bf16> };
        entry(p, &inputs, &vec![0.0; self.gate], state, outputs)
    }

    fn plan(&self, p: &Problem, state: &Mirror, entry: Entry) -> Result<Plan> {
        let of = |t: &Described| t.device(p.dtype());
        let gate = f32s(&[self.gate]);
        let mut call = Call::new(of(&self.q), of(&self.k), of(&self.v), gate, of(&self.o));
        if let Some(lens) = &self.lens {
            call = call.seq_lens(lens);
        }
        if let Some(cu) = &self.cu {
            call = call.cu_seqlens(cu);
        }
        if let Some(slots) = &self.slots {
            call = call.slots(slots);
        }
        if let Some([cos, sin]) = &self.rope {
            let mut rope = DeviceRope::new(cos.device(DType::F32), sin.device(DType::F32));
            if let Some(positions) = &self.positions {
                rope = rope.positions(positions);
            }
            call = call.rope(rope);
        }
        if let Some(lse) = &self.lse {
            call = call.lse(lse.device(DType::F32));
        }
        if let Some(a_dot) = &self.a_dot {
            call = call.a_dot(of(a_dot));
        }
        if let Some(a_mem) = &self.a_mem {
            call = call.a_mem(of(a_mem));
        }
        entry(p, &call, state)
    }
}

type Entry = fn(&Problem, &Call<'_>, &Mirror) -> Result<Plan>;

const PREFILL: Entry = |p, call, state| plan_prefill(p, call, state, &PrefillOptions::default());
const SEGMENT: Entry = |p, call, state| plan_segment(p, call, state, &Target::default());
const DECODE: Entry = |p, call, state| plan_decode(p, call, state, &DecodeOptions::default());
const REPLAY: Entry = |p, call, state| {
    let options = DecodeOptions { runs: Runs::Replay, ..DecodeOptions::default() };
    plan_decode(p, call, state, &options)
};

/// States of two slots in the middle of their streams, 2 tokens open in each.
fn states(p: &Problem) -> (State, Mirror) {
    let (mut state, mut mirror) = (State::new(p, 2).unwrap(), mirror(p, 2));
    let mut first = Arguments::new(p);
    first.lens = Some(vec![2, 2]);
    first.on_host(p, &mut state, false).expect("valid");
    let plan = first.plan(p, &mirror, PREFILL).expect("valid");
    mirror.advance(&plan).expect("as planned");
    (state, mirror)
}

/// Spoilt arguments must give both backends the same error.
#[track_caller]
fn same_error(change: impl FnOnce(&Problem, Arguments) -> Arguments) {
    let p = problem(|b| b.segment_len(4).value_dim(64));
    let spoilt = change(&p, Arguments::new(&p));
    let (mut state, mirror) = states(&p);
    for (decodes, entry) in [(false, PREFILL), (true, DECODE), (true, REPLAY), (false, SEGMENT)] {
        let host = spoilt.on_host(&p, &mut state, decodes).expect_err("refused").to_string();
        let device = spoilt.plan(&p, &mirror, entry).expect_err("refused").to_string();
        assert_eq!(device, host);
    }
}

#[test]
fn shapes_are_refused_as_on_the_host() {
    for shape in [vec![6, 4, 64], vec![6], vec![2, 3, 2, 64], vec![2, 3, 4, 32]] {
        same_error(|_, a| Arguments { q: Described::new(&shape), ..a });
    }
    for shape in [vec![2, 3, 4, 64], vec![2, 4, 2, 64], vec![6, 2, 64], vec![1, 3, 2, 64]] {
        same_error(|_, a| Arguments { k: Described::new(&shape), ..a.clone() });
        same_error(|_, a| Arguments { v: Described::new(&shape), ..a });
    }
    let swapped = || Described::new(&[2, 4, 3, 64]);
    same_error(|_, a| Arguments { o: swapped(), ..a });
    same_error(|_, a| Arguments { a_dot: Some(swapped()), ..a });
    same_error(|_, a| Arguments { a_mem: Some(swapped()), ..a });
    same_error(|_, a| Arguments { lse: Some(Described::new(&[2, 3, 4])), ..a });
    same_error(|_, a| Arguments { gate: 3, ..a });
    same_error(|_, a| Arguments { gate: 0, ..a });
}

#[test]
fn strides_are_refused_as_on_the_host() {
    let wide = |shape: &[usize]| {
        let dense = Described::new(shape);
        Described { strides: dense.strides.iter().map(|s| 2 * s).collect(), ..dense }
    };
    same_error(|_, a| Arguments { q: wide(&a.q.shape), ..a });
    same_error(|_, a| Arguments { k: wide(&a.k.shape), ..a });
    same_error(|_, a| Arguments { v: wide(&a.v.shape), ..a });
    same_error(|_, a| Arguments { o: wide(&a.o.shape), ..a });
    same_error(|_, a| Arguments { a_dot: Some(wide(&a.o.shape)), ..a });
    same_error(|_, a| Arguments { a_mem: Some(wide(&a.o.shape)), ..a });
    same_error(|_, a| Arguments { lse: Some(wide(&[2, 4, 3])), ..a });
    same_error(|_, a| {
        let a = a.rotated(20, 8);
        Arguments { rope: Some([wide(&[20, 8]), Described::new(&[20, 8])]), ..a }
    });
}

#[test]
fn lengths_and_slots_are_refused_as_on_the_host() {
    for lens in [vec![3], vec![3, 3, 3], vec![3, 4], vec![-1, 3]] {
        same_error(|_, a| Arguments { lens: Some(lens), ..a });
    }
    for cu in [&[][..], &[1, 3, 6], &[0, 4, 3], &[0, -1, 6], &[0, 3, 5], &[0, 3, 7], &[0], &[0, 6]]
    {
        same_error(|p, a| a.packed(p, cu));
    }
    for slots in [vec![0], vec![0, 1, 2], vec![0, 2], vec![1, 1]] {
        same_error(|_, a| Arguments { slots: Some(slots), ..a });
    }
}

#[test]
fn rotations_are_refused_as_on_the_host() {
    // Both slots have 2 open tokens without rotation.
    same_error(|_, a| a.rotated(20, 8));
    let p = problem(|b| b.segment_len(4).value_dim(64));
    let same = |spoilt: Arguments| {
        let host = spoilt.on_host(&p, &mut State::new(&p, 2).unwrap(), false);
        let host = host.expect_err("refused").to_string();
        for entry in [PREFILL, SEGMENT, DECODE, REPLAY] {
            let device = spoilt.plan(&p, &mirror(&p, 2), entry).expect_err("refused").to_string();
            assert_eq!(device, host);
        }
    };
    let a = Arguments::new(&p);
    let tables = |cos: &[usize], sin: &[usize]| Arguments {
        rope: Some([Described::new(cos), Described::new(sin)]),
        ..a.clone()
    };
    same(tables(&[1, 4, 3], &[4, 3]));
    same(tables(&[4, 3], &[4, 2]));
    same(tables(&[4, 33], &[4, 33]));
    same(tables(&[2, 3], &[2, 3]));
    same(tables(&[0, 3], &[0, 3]));
    let at = |positions: &[i64]| Arguments {
        positions: Some(positions.to_vec()),
        ..a.clone().rotated(4, 3)
    };
    for positions in [&[][..], &[0; 5], &[0, 4, 0], &[0, -1, 0], &[0, 1, 2, 3, 0, i64::MIN]] {
        same(at(positions));
    }
    // Positions continue from the state.
    let (mut state, mut mirror) = (State::new(&p, 2).unwrap(), mirror(&p, 2));
    let first = a.clone().rotated(4, 3);
    first.on_host(&p, &mut state, false).expect("4 rows");
    mirror.advance(&first.plan(&p, &mirror, SEGMENT).expect("valid")).expect("as planned");
    let host = first.on_host(&p, &mut state, true).expect_err("6 rows").to_string();
    assert_eq!(first.plan(&p, &mirror, DECODE).expect_err("6 rows").to_string(), host);
    let host = a.on_host(&p, &mut state, false).expect_err("rotated").to_string();
    assert_eq!(a.plan(&p, &mirror, PREFILL).expect_err("rotated").to_string(), host);
}

#[test]
fn decode_flush_and_other_problems_are_refused_as_on_the_host() {
    let p = problem(|b| b.segment_len(32).value_dim(64));
    let wide = |heads, dim| Described::new(&[2, 20, heads, dim]);
    let mut a = Arguments::new(&p);
    (a.q, a.o) = (wide(4, 64), wide(4, 64));
    (a.k, a.v) = (wide(2, 64), wide(2, 64));
    (a.lse, a.a_dot, a.a_mem) = (None, None, None);
    a.lens = Some(vec![17, 3]);
    let (mut state, mirror) = (State::new(&p, 2).unwrap(), mirror(&p, 2));
    let host = a.on_host(&p, &mut state, true).expect_err("17 tokens").to_string();
    for entry in [DECODE, REPLAY] {
        assert_eq!(a.plan(&p, &mirror, entry).expect_err("17 tokens").to_string(), host);
    }
    for slots in [&[2][..], &[0, 0]] {
        let host = flush(&p, &mut state, slots).expect_err("refused").to_string();
        assert_eq!(plan_flush(&p, &mirror, slots).expect_err("refused").to_string(), host);
        let host = state.reset(slots).expect_err("refused").to_string();
        let device = mirror.layout().plan_reset(slots).expect_err("refused").to_string();
        assert_eq!(device, host);
    }
    let other = problem(|b| b.segment_len(64).value_dim(64));
    let host = a.on_host(&other, &mut state, false).expect_err("N differs").to_string();
    assert_eq!(a.plan(&other, &mirror, PREFILL).expect_err("N differs").to_string(), host);
    let host = flush(&other, &mut state, &[0]).expect_err("N differs").to_string();
    assert_eq!(plan_flush(&other, &mirror, &[0]).expect_err("N differs").to_string(), host);
}

#[test]
fn what_only_device_memory_asks_for() {
    let p = problem(|b| b);
    let state = mirror(&p, 2);
    let refused = |call: Call<'_>, words: &str| {
        for entry in [PREFILL, SEGMENT, DECODE] {
            let error = entry(&p, &call, &state).expect_err(words).to_string();
            assert!(error.starts_with(words), "{error}");
        }
    };
    let (q, k, v) =
        (tensor(&p, &[2, 3], 4, 64), tensor(&p, &[2, 3], 2, 64), tensor(&p, &[2, 3], 2, 128));
    let (gate, o) = (f32s(&[4]), tensor(&p, &[2, 3], 4, 128));
    let strided = |heads: usize, dim: usize, token: i64| {
        let shape = [2, 3, heads, dim];
        DeviceTensor::strided(p.dtype(), &shape, &[16384, token, 128, 1]).expect("valid")
    };
    let uneven =
        "strides [16384, 1028, 128, 1] (in elements) given, all but the last must be multiples";
    refused(Call::new(strided(4, 64, 1028), k, v, gate, o), &format!("q: {uneven}"));
    refused(Call::new(q, strided(2, 64, 1028), v, gate, o), &format!("k: {uneven}"));
    refused(Call::new(q, k, strided(2, 128, 1028), gate, o), &format!("v: {uneven}"));
    refused(Call::new(q, k, v, gate, strided(4, 128, 1028)), &format!("o: {uneven}"));
    let whole = Call::new(q, k, v, gate, o);
    refused(whole.a_dot(strided(4, 128, 1028)), &format!("a_dot: {uneven}"));
    refused(whole.a_mem(strided(4, 128, 1028)), &format!("a_mem: {uneven}"));
    refused(Call::new(q, k, v, gate, strided(4, 128, 128)), "o: strides [16384, 128, 128, 1]");
    refused(Call::new(q, k, v, f32s(&[2, 2]), o), "gate: shape [2, 2] given, [Hq] expected");
    let f16s = |t: DeviceTensor| DeviceTensor::contiguous(DType::F16, t.shape()).expect("shape");
    refused(Call::new(f16s(q), k, v, gate, o), "q: dtype f16 given, bf16 expected");
    refused(Call::new(q, f16s(k), v, gate, o), "k: dtype f16 given, bf16 expected");
    refused(Call::new(q, k, f16s(v), gate, o), "v: dtype f16 given, bf16 expected");
    refused(Call::new(q, k, v, f16s(gate), o), "gate: dtype f16 given, f32 expected");
    refused(Call::new(q, k, v, gate, f16s(o)), "o: dtype f16 given, bf16 expected");
    refused(whole.lse(f16s(f32s(&[2, 4, 3]))), "lse: dtype f16 given, f32 expected");
    let tables = f32s(&[16, 8]);
    refused(whole.rope(DeviceRope::new(f16s(tables), tables)), "rope.cos: dtype f16 given");
    refused(
        whole.rope(DeviceRope::new(tables, tables).device_positions(4)),
        "positions: 4 elements",
    );
    let fixed = StateLayout::new(&p, 2, false).expect("supported");
    let error = PREFILL(&p, &whole.rope(DeviceRope::new(tables, tables)), &Mirror::new(&fixed));
    let error = error.expect_err("no room").to_string();
    assert_eq!(error, "rope: a rotation given, a state with room for rotated keys expected");
    // Nothing is compiled for these.
    for p in [problem(|b| b.dtype(DType::F32)), problem(|b| b.key_dim(72))] {
        let error = StateLayout::new(&p, 2, true).expect_err("not compiled");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}

#[test]
fn bad_addresses_launch_nothing() {
    let p = problem(|b| b);
    let mut state = mirror(&p, 2);
    let call = call(&p, &[2, 200]).lse(f32s(&[2, 4, 200])).a_dot(tensor(&p, &[2, 200], 4, 128));
    let tables = DeviceRope::new(f32s(&[512, 8]), f32s(&[512, 8])).device_positions(200);
    let plan = PREFILL(&p, &call.rope(tables), &state).expect("valid");
    state.advance(&plan).expect("as planned");
    let aligns: Vec<_> = plan.requirements().iter().map(|r| (r.operand, r.align)).collect();
    use Operand::*;
    let expected = [
        (Q, 16),
        (K, 16),
        (V, 16),
        (Gate, 4),
        (O, 16),
        (Lse, 4),
        (ADot, 16),
        (Cos, 4),
        (Sin, 4),
        (Positions, 8),
        (State, 256),
        (Workspace, 256),
    ];
    assert_eq!(aligns, expected);
    let refused = |plan: &Plan, operand: Operand, address: u64| {
        let mut recorder = Recorder::default();
        let addresses = addresses(plan).with(operand, address);
        // SAFETY: nothing is executed.
        let error = unsafe { plan.run(&addresses, &mut recorder) }.expect_err("refused");
        assert!(recorder.0.is_empty(), "nothing is launched");
        error.to_string()
    };
    for (operand, align) in expected {
        for address in [0, align / 2, 3 * align + 2] {
            let error = refused(&plan, operand, address);
            let words = format!("{operand}: address {address:#x} given, a multiple of {align} ");
            assert!(error.starts_with(&words), "{error}");
        }
    }
    let spans: Vec<_> = plan.requirements().iter().map(|r| r.after).collect();
    let o = 2 * 200 * 4 * 128 * 2;
    assert_eq!(spans[..5], [o / 2, o / 4, o / 2, 16, o]);
    assert_eq!(spans[10..], [mirror(&p, 2).layout().bytes(), plan.workspace_bytes()]);
    // Addresses that a plan does not use do not matter; one without steps uses none.
    let flush = plan_flush(&p, &state, &[0]).expect("valid");
    assert_eq!(
        refused(&flush, State, 8),
        "state: address 0x8 given, a multiple of 256 other than 0 expected"
    );
    assert_eq!(flush.requirements().len(), 2);
    let nothing = plan_flush(&p, &state, &[]).expect("valid");
    assert!(nothing.requirements().is_empty() && run(&nothing).is_empty());
}

/// Numbers in 0..n, the same on every run.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn the_mirror_moves_as_the_state_of_the_host() {
    let p = problem(|b| b.heads(1).kv_heads(1).segment_len(8).value_dim(64));
    let (mut state, mut mirror, mut draw) = (State::new(&p, 3).unwrap(), mirror(&p, 3), Draw(1));
    let mut entries = [0; 4];
    for _ in 0..200 {
        let slots: Vec<usize> = match draw.below(3) {
            0 => vec![2, 0],
            1 => vec![1],
            _ => vec![0, 1, 2],
        };
        let longest = [3, 16, 30][draw.below(3)];
        let lens: Vec<i32> = slots.iter().map(|_| draw.below(longest + 1) as i32).collect();
        let of = |heads, dim| Described::new(&[slots.len(), 30, heads, dim]);
        let mut a = Arguments::new(&p);
        (a.q, a.k, a.v, a.o) = (of(1, 64), of(1, 64), of(1, 64), of(1, 64));
        (a.lse, a.a_dot, a.a_mem) = (None, None, None);
        a.slots = Some(slots.clone());
        a.lens = Some(lens.clone());
        let room = |(&slot, &len): (&usize, &i32)| len as usize <= 8 - state.open_len(slot);
        let kind = match draw.below(4) {
            0 => 0,
            _ if slots.iter().zip(&lens).all(room) => 1,
            _ if lens.iter().all(|len| *len <= 16) => 2 + draw.below(2),
            _ => 0,
        };
        entries[kind] += 1;
        let plan = a.plan(&p, &mirror, [PREFILL, SEGMENT, DECODE, REPLAY][kind]).expect("valid");
        mirror.check(&plan).expect("as planned");
        mirror.advance(&plan).expect("as planned");
        a.on_host(&p, &mut state, kind >= 2).expect("valid");
        if draw.below(5) == 0 {
            let plan = plan_flush(&p, &mirror, &slots).expect("valid");
            mirror.advance(&plan).expect("as planned");
            flush(&p, &mut state, &slots).expect("valid");
        }
        if draw.below(20) == 0 {
            let plan = mirror.layout().plan_reset(&slots).expect("valid");
            mirror.advance(&plan).expect("as planned");
            state.reset(&slots).expect("valid");
        }
        for slot in 0..3 {
            let host = (state.tokens(slot), state.committed(slot), state.open_len(slot));
            let device = (mirror.tokens(slot), mirror.committed(slot), mirror.open_len(slot));
            assert_eq!(device, host, "slot {slot}");
        }
    }
    assert!(entries.iter().all(|count| *count > 20), "{entries:?}");
}

#[test]
fn replays_end_where_they_would_be_invalid() {
    let p = problem(|b| b.segment_len(8));
    let mut state = mirror(&p, 2);
    let tables = DeviceRope::new(f32s(&[20, 8]), f32s(&[20, 8]));
    let rotated = REPLAY(&p, &call(&p, &[2, 3]).rope(tables), &state).expect("valid");
    let plain = REPLAY(&p, &call(&p, &[2, 3]), &state).expect("valid");
    for replay in 0..6 {
        let before = state.clone();
        let result = state.advance(&plain).map_err(|e| e.to_string());
        match replay {
            0 => {
                result.expect("nothing is open yet");
                state = before;
            }
            _ => {
                let error = result.expect_err("inside an open segment");
                assert!(error.starts_with("rope: slot 0 holds an open segment"), "{error}");
                assert_eq!(state, before, "nothing changes");
            }
        }
        state.advance(&rotated).expect("18 of 20 rows");
    }
    let before = state.clone();
    let error = state.advance(&rotated).expect_err("21 rows").to_string();
    assert_eq!(
        error,
        "positions (sequence 0, token 2): 20 given, 0 to 20 − 1 (rows of rope.cos) expected"
    );
    assert_eq!(state, before, "nothing changes");
    let other = mirror(&p, 3);
    let error = other.check(&rotated).expect_err("another pool").to_string();
    assert_eq!(error, "state: 3 elements given, 2 (slots) expected");
}

#[test]
fn tables_of_sequences_in_device_memory() {
    let p = problem(|b| b.segment_len(8));
    let mut state = mirror(&p, 4);
    let options = DecodeOptions { runs: Runs::Table, ..DecodeOptions::default() };
    let slots = [0, 1];
    let plan = plan_decode(&p, &call(&p, &[2, 5]).slots(&slots), &state, &options).expect("valid");
    state.advance_table(&plan, &[(3, 5), (1, 0)]).expect("valid");
    state.advance_table(&plan, &[(1, 1), (3, 5)]).expect("valid");
    let seen = |s: &Mirror| [0, 1, 2, 3].map(|slot| (s.tokens(slot), s.committed(slot)));
    assert_eq!(seen(&state), [(0, 0), (1, 0), (0, 0), (10, 8)]);
    for (table, words) in [
        (&[(0, 1)][..], "sequences: 1 elements given, 2 (the number of sequences)"),
        (&[(0, 1), (4, 1)], "slots[1]: 4 given"),
        (&[(0, 1), (0, 1)], "slots[1]: 0 given"),
        (&[(0, 1), (1, 6)], "q (sequence 1): 6 given, 0 to 5 new tokens expected"),
        (&[(PAD_SLOT, 1), (4, 6)], "slots[1]: 4 given, less than the state's 4 slots expected"),
    ] {
        let error = state.advance_table(&plan, table).expect_err(words).to_string();
        assert!(error.starts_with(words), "{error}");
    }
    assert_eq!(seen(&state), [(0, 0), (1, 0), (0, 0), (10, 8)]);
    state.advance_table(&plan, &[(PAD_SLOT, 7), (PAD_SLOT, 0)]).expect("padding alone");
    assert_eq!(seen(&state), [(0, 0), (1, 0), (0, 0), (10, 8)]);
    state.advance_table(&plan, &[(PAD_SLOT, 1), (1, 2)]).expect("padding before");
    assert_eq!(seen(&state), [(0, 0), (3, 0), (0, 0), (10, 8)]);
    let slots = [0, 1];
    let fixed = REPLAY(&p, &call(&p, &[2, 5]).slots(&slots), &state).expect("valid");
    state.advance_table(&fixed, &[(0, 1), (1, 1)]).expect_err("its own sequences");
}
