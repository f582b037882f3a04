//! The crate's plans for CUDA devices as backends: device memory and kernels are the simulator's.
//!
//! Every buffer is an allocation of exactly its size, so that the simulator reports an access
//! outside of it; workspaces start unwritten; rows of open segments that hold no token are NaN
//! before every call. After every call the state must be in order, and a second run from the same
//! state, in another order of blocks and with late copies, must leave the same bits.

use std::fmt::Display;

use bytemuck::{Pod, cast_slice};
use infini_attn::cuda::params::{InfiniCounters, InfiniState};
use infini_attn::cuda::{
    Addresses, Arch, Call as DeviceCall, DecodeOptions, DeviceRope, DeviceTensor, Mirror, Operand,
    Plan, PrefillOptions, Runs, StateLayout, Target, plan_decode, plan_flush, plan_forward,
    plan_prefill, plan_segment,
};
use infini_attn::{DType, Element, Problem, Result};
use ptxsim::Timing;

use super::Backend;
use super::entry::Entry;
use crate::common::buffers::{OutputBuffers, Strided};
use crate::common::call::{Call, TABLE_ROWS, laid_out};
use crate::common::cases::Case;
use crate::common::simulator::Simulator;
use crate::common::tolerance::Precision;
use crate::common::{WithType, bits, narrow, with_type};

/// An entry point on a simulated device.
#[derive(Clone, Copy, Debug)]
pub struct Simulated {
    pub entry: Entry,
    /// The newest kernels the device runs.
    pub arch: Arch,
}

/// A pool of states in simulated memory.
pub struct DeviceState {
    sim: Simulator,
    mirror: Mirror,
    /// The newest kernels the device runs.
    arch: Arch,
    /// Address of the allocation.
    address: u64,
    /// Calls made.
    calls: u64,
    /// Draws options.
    seed: u64,
    findings: Vec<String>,
}

impl Backend for Simulated {
    type State = DeviceState;
    const PRECISION: Precision = Precision::TensorCore;
    // 16 bytes of 16-bit elements.
    const MARGIN: usize = 8;
    const PARALLEL: bool = true;

    fn refuses(&self, case: &Case) -> Option<&'static str> {
        self.entry.refuses(case)
    }

    fn new_state(&self, case: &Case, slots: usize) -> DeviceState {
        let layout = StateLayout::new(&case.problem, slots, case.rope.is_some());
        let layout = layout.unwrap_or_else(|e| panic!("{}: {e}", case.name));
        DeviceState::new(layout, self.arch, case.seed)
    }

    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut DeviceState,
        out: &mut OutputBuffers<T>,
    ) -> Result<()> {
        state.poison();
        let before = state.bytes();
        let turn = state.seed + state.calls;
        let entry = self.entry.of(problem, call, |slot| state.mirror.open_len(slot), turn);
        let plan = plan(entry, problem, call, out, state)?;
        state.mirror.advance(&plan)?;
        state.calls += 1;
        let canaries = out.clone();
        state.run(&plan, call, gate, out)?;
        state.restore();
        state.check(problem);

        let (first, after) = (out.bits(), state.bytes());
        let mut again = canaries;
        state.write(&before);
        state.another_order(|state| state.run(&plan, call, gate, &mut again))?;
        state.restore();
        let same = state.bytes() == after && again.bits() == first;
        if !same {
            state.findings.push(format!("another order of blocks leaves other bits\n{plan}"));
        }
        Ok(())
    }

    fn flush(&self, problem: &Problem, state: &mut DeviceState, slots: &[usize]) -> Result<()> {
        state.poison();
        let plan = plan_flush(problem, &state.mirror, slots)?;
        state.mirror.advance(&plan)?;
        let workspace = state.sim.allocate("workspace", plan.workspace_bytes());
        let addresses = Addresses::new()
            .with(Operand::State, state.address)
            .with(Operand::Workspace, state.sim.device.address(workspace));
        // SAFETY: both allocations have the sizes the plan asks for, and only it uses them.
        let result = unsafe { plan.run(&addresses, &mut state.sim) };
        state.sim.device.free(workspace);
        state.restore();
        state.check(problem);
        result
    }

    fn memory(&self, p: &Problem, state: &DeviceState, slot: usize) -> [Vec<f64>; 2] {
        let z = p.kv_heads() * p.key_dim();
        let at = state.parts();
        [(at.memory, z * p.value_dim()), (at.normalizer, z)].map(|(address, count)| {
            let values = state.sim.read::<f32>(address + (4 * slot * count) as u64, count);
            values.into_iter().map(f64::from).collect()
        })
    }

    fn counters(&self, state: &DeviceState, slot: usize) -> [u64; 3] {
        let m = &state.mirror;
        [m.tokens(slot), m.committed(slot), m.open_len(slot) as u64]
    }

    fn findings(&self, state: &mut DeviceState) -> Vec<String> {
        std::mem::take(&mut state.findings)
    }
}

fn plan<T: Element>(
    entry: Entry,
    p: &Problem,
    call: &Call<'_, T>,
    out: &OutputBuffers<T>,
    state: &DeviceState,
) -> Result<Plan> {
    let gate = DeviceTensor::contiguous(DType::F32, &[p.heads()])?;
    let (q, k, v) = (tensor(&call.q)?, tensor(&call.k)?, tensor(&call.v)?);
    let mut device = DeviceCall::new(q, k, v, gate, tensor(&out.o)?);
    device = laid_out!(device, call);
    if let Some(lse) = &out.lse {
        device = device.lse(tensor(lse)?);
    }
    if let Some(a_dot) = &out.a_dot {
        device = device.a_dot(tensor(a_dot)?);
    }
    if let Some(a_mem) = &out.a_mem {
        device = device.a_mem(tensor(a_mem)?);
    }
    if let Some(r) = &call.rope {
        let table = || DeviceTensor::contiguous(DType::F32, &[TABLE_ROWS, r.rotation.channels / 2]);
        let rope = DeviceRope::new(table()?, table()?).interleaved(r.rotation.interleaved);
        device = device.rope(match &r.positions {
            Some(positions) => rope.positions(positions),
            None => rope,
        });
    }
    let draw = |n: u64, of: &[u64]| of[(state.seed / n) as usize % of.len()];
    // Many multiprocessors make many splits.
    let target = Target {
        arch: state.arch,
        // The results are the same, and a launch that does not wait is found.
        early: true,
        multiprocessors: draw(2, &[1, 16, 132]) as usize,
        split_len: draw(2, &[64, 256]) as usize,
        ..Target::DEFAULT
    };
    match entry {
        Entry::Segment => {
            // The newer kernel serves devices that a sequence fills.
            let target = Target { multiprocessors: 1, ..target };
            plan_segment(p, &device, &state.mirror, &target)
        }
        Entry::Decode => {
            let runs = [Runs::Once, Runs::Replay][draw(1, &[0, 1]) as usize];
            let options = DecodeOptions { runs, target };
            plan_decode(p, &device, &state.mirror, &options)
        }
        _ => {
            // Little workspace makes many runs.
            let options = PrefillOptions { workspace_bytes: draw(1, &[1, 256 << 20]), target };
            let plan = if entry == Entry::Forward { plan_forward } else { plan_prefill };
            plan(p, &device, &state.mirror, &options)
        }
    }
}

fn tensor<T: Element>(x: &Strided<T>) -> Result<DeviceTensor> {
    DeviceTensor::strided(T::DTYPE, x.shape(), x.strides())
}

impl DeviceState {
    /// Empty states.
    fn new(layout: StateLayout, arch: Arch, seed: u64) -> Self {
        let mut sim = Simulator::of(arch).seed(seed);
        let buffer = sim.allocate("state", layout.bytes());
        let address = sim.device.address(buffer);
        // What an allocator hands out: rows of open segments that nobody wrote are NaN.
        sim.device.fill(address, layout.bytes(), 0xff).unwrap_or_else(|e| panic!("{e}"));
        let mirror = Mirror::new(&layout);
        let mut state = Self { sim, mirror, arch, address, calls: 0, seed, findings: vec![] };
        let plan = layout.plan_init().unwrap_or_else(|e| panic!("{e}"));
        let addresses = Addresses::new().with(Operand::State, address);
        state.mirror.advance(&plan).unwrap_or_else(|e| panic!("{e}"));
        // SAFETY: the allocation has the layout's size.
        let result = unsafe { plan.run(&addresses, &mut state.sim) };
        state.note("init", result);
        state.check(layout.problem());
        state
    }

    fn note<E: Display>(&mut self, what: &str, result: std::result::Result<(), E>) {
        self.findings.extend(result.err().map(|e| format!("{what}: {e}")));
    }

    /// Addresses of its parts.
    fn parts(&self) -> InfiniState {
        self.mirror.layout().params(self.address)
    }

    fn bytes(&self) -> Vec<u8> {
        self.sim.read(self.address, self.mirror.layout().bytes() as usize)
    }

    fn write(&mut self, bytes: &[u8]) {
        let written = self.sim.device.write(self.address, bytes);
        self.note("state", written);
    }

    /// Runs with another seed and late copies.
    fn another_order(&mut self, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.sim.device.options.seed += 1;
        self.sim.device.options.timing = Timing::Lazy;
        let result = run(self);
        self.sim.device.options.timing = Timing::Eager;
        result
    }

    /// Puts a call's buffers into device memory, runs its plan, and takes the outputs back.
    fn run<T: Element>(
        &mut self,
        plan: &Plan,
        call: &Call<'_, T>,
        gate: &[f32],
        out: &mut OutputBuffers<T>,
    ) -> Result<()> {
        let mut memory =
            Memory { sim: &mut self.sim, buffers: vec![], addresses: Addresses::new() };
        memory.addresses.set(Operand::State, self.address);
        memory.uninitialised(Operand::Workspace, plan.workspace_bytes());
        memory.strided(Operand::Q, &call.q);
        memory.strided(Operand::K, &call.k);
        memory.strided(Operand::V, &call.v);
        memory.upload(Operand::Gate, gate, 0);
        if let Some(rope) = &call.rope {
            memory.upload(Operand::Cos, rope.cos, 0);
            memory.upload(Operand::Sin, rope.sin, 0);
        }
        let o = memory.strided(Operand::O, &out.o);
        let lse = out.lse.as_ref().map(|x| memory.strided(Operand::Lse, x));
        let a_dot = out.a_dot.as_ref().map(|x| memory.strided(Operand::ADot, x));
        let a_mem = out.a_mem.as_ref().map(|x| memory.strided(Operand::AMem, x));
        // SAFETY: buffers have the sizes of the tensors the plan was made for, and nothing else
        // uses them; the mirror was advanced.
        let result = unsafe { plan.run(&memory.addresses, memory.sim) };
        memory.download(o, &mut out.o);
        for (at, to) in [(a_dot, &mut out.a_dot), (a_mem, &mut out.a_mem)] {
            if let (Some(at), Some(to)) = (at, to) {
                memory.download(at, to);
            }
        }
        if let (Some(at), Some(to)) = (lse, &mut out.lse) {
            memory.download(at, to);
        }
        memory.free();
        result
    }

    /// NaN in every row of an open segment that holds no token.
    fn poison(&mut self) {
        for (at, bytes) in self.empty_parts() {
            let filled = self.sim.device.fill(at, bytes, 0xff);
            self.note("empty memory", filled);
        }
        let (p, at) = (*self.mirror.problem(), self.parts());
        let n = p.segment_len();
        for (part, width) in
            [(at.open_k, p.key_dim()), (at.open_k_rotated, p.key_dim()), (at.open_v, p.value_dim())]
        {
            if part == 0 {
                continue;
            }
            let row = (width * p.dtype().bytes()) as u64;
            for slot in 0..self.mirror.layout().slots() {
                let open = self.mirror.open_len(slot);
                for h in 0..p.kv_heads() {
                    let first = ((slot * p.kv_heads() + h) * n + open) as u64;
                    let filled =
                        self.sim.device.fill(part + first * row, (n - open) as u64 * row, 0xff);
                    self.note("open segment", filled);
                }
            }
        }
    }

    /// M, z and snapshot of slots without a committed segment: address and bytes.
    fn empty_parts(&self) -> Vec<(u64, u64)> {
        let (p, at) = (self.mirror.problem(), self.parts());
        let z = p.kv_heads() * p.key_dim();
        let m = z * p.value_dim();
        let parts =
            [(at.memory, 4 * m), (at.normalizer, 4 * z), (at.snapshot, p.dtype().bytes() * m)];
        let slots = 0..self.mirror.layout().slots();
        let empty = slots.filter(|slot| self.mirror.committed(*slot) == 0);
        let of = |slot| parts.map(|(part, bytes)| (part + (slot * bytes) as u64, bytes as u64));
        empty.flat_map(of).collect()
    }

    /// Memories of empty slots as they were before [`Self::poison`]; nothing but 0 was written there.
    fn restore(&mut self) {
        for (at, bytes) in self.empty_parts() {
            let found: Vec<u8> = self.sim.read(at, bytes as usize);
            if !found.iter().all(|byte| *byte == found[0] && [0, 0xff].contains(byte)) {
                self.findings.push("the memory of an empty slot was written to".into());
            }
            let filled = self.sim.device.fill(at, bytes, 0);
            self.note("empty memory", filled);
        }
    }

    /// What must hold between calls.
    fn check(&mut self, p: &Problem) {
        let (at, slots) = (self.parts(), self.mirror.layout().slots());
        for slot in 0..slots {
            let counters = at.counters + (slot * size_of::<InfiniCounters>()) as u64;
            let c: InfiniCounters = self.sim.read(counters, 1)[0];
            let m = &self.mirror;
            let expected = (m.tokens(slot), m.committed(slot), m.open_len(slot) as u32);
            if (c.tokens, c.committed, c.open_len) != expected {
                self.findings.push(format!("slot {slot}: {c:?}, {expected:?} expected"));
            }
        }
        // Behind the status word lie tickets only.
        let rest = self.address + self.mirror.layout().bytes() - at.status;
        let words: Vec<u8> = self.sim.read(at.status, rest as usize);
        if let Some(i) = words.iter().position(|w| *w != 0) {
            let findings = format!("byte {i} from the status word on is {}, 0 expected", words[i]);
            self.findings.push(findings);
        }
        let finding = with_type(p.dtype(), Snapshots { state: self, p });
        self.findings.extend(finding);
    }
}

/// Compares every snapshot with the memory it is made from.
struct Snapshots<'a> {
    state: &'a DeviceState,
    p: &'a Problem,
}

impl WithType for Snapshots<'_> {
    type Output = Option<String>;

    fn run<T: Element>(self) -> Option<String> {
        let (p, at) = (self.p, self.state.parts());
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let memories = self.state.mirror.layout().slots() * p.kv_heads();
        let sim = &self.state.sim;
        let m: Vec<f32> = sim.read(at.memory, memories * dk * dv);
        let snapshots: Vec<T> = sim.read(at.snapshot, memories * dk * dv);
        let scales: Vec<f32> = sim.read(at.snapshot_scale, memories * dv / 32);
        for (i, m) in m.chunks_exact(dk * dv).enumerate() {
            let scales = &scales[i * dv / 32..][..dv / 32];
            for (block, &s) in scales.iter().enumerate() {
                let max = m.chunks_exact(dv).flat_map(|row| &row[32 * block..][..32]);
                let max = max.fold(0.0f32, |max, x| max.max(x.abs()));
                let good = match max > 0.0 && max.is_finite() {
                    true => s.log2().fract() == 0.0 && (1.0..2.0).contains(&(max * s)),
                    false => s == 1.0,
                };
                if !good {
                    return Some(format!("memory {i}, columns {}: scale {s} of {max}", 32 * block));
                }
            }
            let scaled: Vec<f32> =
                m.iter().enumerate().map(|(j, x)| x * scales[j % dv / 32]).collect();
            let want: Vec<T> = narrow(&scaled);
            let got = &snapshots[i * dk * dv..][..dk * dv];
            if bits(&want) != bits(got) {
                let differ = |j: &usize| bits(&want[*j..j + 1]) != bits(&got[*j..j + 1]);
                let j = (0..dk * dv).find(differ).unwrap_or(0);
                let (got, want): (f64, f64) = (got[j].into(), want[j].into());
                return Some(format!(
                    "memory {i}: snapshot {got} at [{}, {}], {want} expected",
                    j / dv,
                    j % dv
                ));
            }
        }
        None
    }
}

/// Device memory of one run.
struct Memory<'a> {
    sim: &'a mut Simulator,
    buffers: Vec<ptxsim::Buffer>,
    addresses: Addresses,
}

impl Memory<'_> {
    /// A buffer whose element `offset` is the operand's first.
    fn upload<T: Pod>(&mut self, operand: Operand, data: &[T], offset: usize) -> u64 {
        let buffer = self.sim.device.buffer(&format!("{operand}"), data);
        let address = self.sim.device.address(buffer);
        self.buffers.push(buffer);
        self.addresses.set(operand, address + (offset * size_of::<T>()) as u64);
        address
    }

    fn strided<T: Element>(&mut self, operand: Operand, x: &Strided<T>) -> u64 {
        self.upload(operand, x.data(), x.offset())
    }

    fn uninitialised(&mut self, operand: Operand, bytes: u64) {
        let buffer = self.sim.allocate(&format!("{operand}"), bytes);
        self.buffers.push(buffer);
        self.addresses.set(operand, self.sim.device.address(buffer));
    }

    fn download<T: Element>(&self, address: u64, to: &mut Strided<T>) {
        let values: Vec<T> = self.sim.read(address, to.data().len());
        to.data_mut().copy_from_slice(cast_slice(&values));
    }

    fn free(self) {
        self.buffers.into_iter().for_each(|b| self.sim.device.free(b));
    }
}
