//! Graphs of the operations over rotating buffers.

use std::any::Any;
use std::cell::Cell;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, DevicePtr};
use half::bf16;
use infini_attn::DType;
use infini_attn::cuda::{
    Addresses, Call, CudaLauncher, Device, DeviceTensor, KeySumsMirror, Launch, Launcher, Operand,
    Plan, Runs, State, plan_apply, plan_compose, plan_decode, plan_flush, plan_key_sums,
    plan_merge_memories, plan_merge_partials, plan_prefill, plan_segment, plan_segment_map,
};

use crate::cases::{Case, DECODE_STEPS, Operation, Shape};
use crate::noise::Noise;
use crate::roofline::Figures;
use crate::stopwatch::{Stopwatch, median};
use crate::switches::{is_simulated, note};

/// Buffers of one operation together, at least: several times the largest L2.
const ROTATE_BYTES: usize = 512 << 20;
const MOST_SETS: usize = 16;

impl Case {
    /// Makes the buffers and captures one graph per set of them.
    pub fn prepare(&self, device: &Device) -> Result<Work> {
        let first = Set::new(self, device)?;
        let most = if is_simulated(device)? { 1 } else { MOST_SETS };
        let copies = ROTATE_BYTES.div_ceil(first.bytes()).clamp(1, most);
        let mut sets = vec![first];
        for _ in 1..copies {
            sets.push(Set::new(self, device)?);
        }
        let graphs = sets.iter_mut().map(|set| set.capture(self, device));
        let graphs = graphs.collect::<Result<Vec<_>>>()?;
        let steps = if self.operation == Operation::Decode { DECODE_STEPS } else { 1 };
        let (watch, name) = (Stopwatch::new(device)?, self.name());
        let work =
            Work { name, graphs, watch, next: Cell::new(0), steps, work: self.work(), _sets: sets };
        work.time(copies as u64)?;
        Ok(work)
    }
}

/// An operation ready to be replayed.
pub struct Work {
    name: String,
    graphs: Vec<CudaGraph>,
    watch: Stopwatch,
    next: Cell<usize>,
    /// Runs of the operation in one graph.
    steps: usize,
    work: [f64; 2],
    _sets: Vec<Set>,
}

impl Work {
    /// Time of that many replays, on the device.
    pub fn time(&self, replays: u64) -> Result<Duration> {
        note(&format!("replays of {}", self.name));
        let time = self.watch.time(|| {
            for _ in 0..replays {
                let i = self.next.replace((self.next.get() + 1) % self.graphs.len());
                self.graphs[i].launch()?;
            }
            Ok(())
        });
        note("done");
        time
    }

    /// Of the seconds per replay.
    pub fn figures(&self, samples: Vec<f64>) -> Option<Figures> {
        let [flops, bytes] = self.work;
        let seconds = median(samples) / self.steps as f64;
        let name = self.name.clone();
        seconds.is_finite().then_some(Figures { name, seconds, flops, bytes })
    }
}

/// Of q, k and v.
static NOISE: LazyLock<[Noise; 3]> = LazyLock::new(|| [1, 2, 3].map(Noise::new));

/// One set of buffers: tensors, state, workspace, all alive as long as their graph.
pub struct Set {
    pub state: State,
    pub addresses: Addresses,
    pub o: CudaSlice<bf16>,
    bytes: usize,
    keep: Vec<Box<dyn Any>>,
}

impl Set {
    pub fn new(case: &Case, device: &Device) -> Result<Self> {
        let s = case.shape;
        let problem = case.problem()?;
        let rows = s.sequences * s.tokens * s.dim;
        let noise = |i: usize, heads| NOISE[i].upload(device, rows * heads);
        let (q, k, v) = (noise(0, s.heads)?, noise(1, s.kv_heads)?, noise(2, s.kv_heads)?);
        let o = device.stream().alloc_zeros::<bf16>(rows * s.heads)?;
        let beta = if case.operation == Operation::Local { f32::NEG_INFINITY } else { 0.0 };
        let gate = device.upload(&vec![beta; s.heads])?;
        Self::of(State::new(device, &problem, s.sequences, false)?, [q, k, v], gate, o)
    }

    /// Of the given tensors.
    pub fn of(
        state: State,
        tensors: [CudaSlice<bf16>; 3],
        gate: CudaSlice<f32>,
        o: CudaSlice<bf16>,
    ) -> Result<Self> {
        let stream = state.device().stream().clone();
        let mut addresses = Addresses::new();
        for (operand, tensor) in [Operand::Q, Operand::K, Operand::V].into_iter().zip(&tensors) {
            addresses.set(operand, tensor.device_ptr(&stream).0);
        }
        addresses.set(Operand::O, o.device_ptr(&stream).0);
        addresses.set(Operand::Gate, gate.device_ptr(&stream).0);
        addresses.set(Operand::State, state.address());
        let elements: usize = tensors.iter().map(CudaSlice::len).sum::<usize>() + o.len();
        let bytes = 2 * elements + state.bytes();
        let keep: Vec<Box<dyn Any>> = vec![Box::new(tensors), Box::new(gate)];
        Ok(Self { state, addresses, o, bytes, keep })
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    /// Brings the open segments to their length.
    fn open(&mut self, case: &Case, device: &Device) -> Result<()> {
        let filling = Shape { tokens: case.shape.open, open: 0, ..case.shape };
        if case.shape.open == 0 {
            return Ok(());
        }
        let filler = Case { operation: Operation::Prefill, shape: filling };
        let mut set = Set::new(&filler, device)?;
        set.addresses.set(Operand::State, self.state.address());
        let plan = filler.plan(&set.state)?;
        set.run(&plan, device)?;
        self.state.advance(&plan)?;
        device.synchronize()?;
        Ok(())
    }

    /// Runs a plan once, in a workspace of its own.
    pub fn run(&mut self, plan: &Plan, device: &Device) -> Result<()> {
        self.workspace(plan, device)?;
        device.prepare(plan)?;
        // SAFETY: the addresses are those of buffers of this set, made for these shapes; they live
        // until the device was waited for.
        unsafe { plan.run(&self.addresses, &mut device.launcher())? };
        Ok(())
    }

    fn workspace(&mut self, plan: &Plan, device: &Device) -> Result<()> {
        let workspace = device.stream().alloc_zeros::<u8>(plan.workspace_bytes().max(1) as usize)?;
        self.addresses.set(Operand::Workspace, workspace.device_ptr(device.stream()).0);
        self.keep.push(Box::new(workspace));
        Ok(())
    }

    /// Zeros for every operand of the plan that has no buffer yet: sums, maps, partial results.
    fn complete(&mut self, plan: &Plan, device: &Device) -> Result<()> {
        for need in plan.requirements() {
            if need.operand == Operand::Workspace || self.addresses.get(need.operand) != 0 {
                continue;
            }
            let buffer = device.stream().alloc_zeros::<u8>((need.before + need.after) as usize)?;
            self.addresses.set(need.operand, buffer.device_ptr(device.stream()).0 + need.before);
            self.keep.push(Box::new(buffer));
        }
        Ok(())
    }

    fn capture(&mut self, case: &Case, device: &Device) -> Result<CudaGraph> {
        self.open(case, device)?;
        let plan = case.plan(&self.state)?;
        self.complete(&plan, device)?;
        let counters = self.counters(device)?;
        // Also fills the workspace, for graphs of single phases.
        self.run(&plan, device)?;
        device.synchronize()?;
        let stream = device.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let recorded = self.record(case, device, &plan, &counters);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        recorded?;
        let graph = graph?.context("the capture gave no graph")?;
        graph.upload()?;
        Ok(graph)
    }

    fn record(&self, case: &Case, device: &Device, plan: &Plan, counters: &[u8]) -> Result<()> {
        let mut launcher = device.launcher();
        let operations: &[&str] = match case.operation {
            Operation::Local => &["segment_attention"],
            Operation::StatePhases => {
                &["segment_state", "normaliser_scan", "segment_transition", "memory_scan"]
            }
            _ => &[],
        };
        let steps = if case.operation == Operation::Decode { DECODE_STEPS } else { 1 };
        if matches!(case.operation, Operation::Decode | Operation::Flush) {
            let at = self.state.mirror().layout().params(self.state.address()).counters;
            launcher.copy(at, counters)?;
        }
        for _ in 0..steps {
            let mut some = Only { inner: &mut launcher, operations };
            // SAFETY: as in `run`; the buffers live as long as the graph, in `Work`. Counters are
            // put back by the graph itself, so that every replay starts from the same.
            unsafe { plan.run(&self.addresses, &mut some)? };
        }
        Ok(())
    }

    /// The device's counters as they are now.
    fn counters(&self, device: &Device) -> Result<Vec<u8>> {
        let mirror = self.state.mirror();
        let mut bytes = vec![];
        for slot in 0..mirror.layout().slots() {
            let counters = infini_attn::cuda::params::InfiniCounters {
                tokens: mirror.tokens(slot),
                committed: mirror.committed(slot),
                open_len: mirror.open_len(slot) as u32,
                ..Default::default()
            };
            bytes.extend_from_slice(bytemuck::bytes_of(&counters));
        }
        device.synchronize()?;
        Ok(bytes)
    }
}

impl Case {
    pub fn plan(&self, state: &State) -> Result<Plan> {
        let s = self.shape;
        let (problem, mirror) = (self.problem()?, state.mirror());
        let tensor =
            |heads| DeviceTensor::contiguous(DType::BF16, &[s.sequences, s.tokens, heads, s.dim]);
        let (q, kv) = (tensor(s.heads)?, tensor(s.kv_heads)?);
        let gate = DeviceTensor::contiguous(DType::F32, &[s.heads])?;
        let call = Call::new(q, kv, kv, gate, q);
        let options = state.device().prefill_options()?;
        let replay = state.device().decode_options(Runs::Replay)?;
        Ok(match self.operation {
            Operation::Segment => plan_segment(&problem, &call, mirror, &options.target)?,
            Operation::Decode => plan_decode(&problem, &call, mirror, &replay)?,
            Operation::Flush => {
                plan_flush(&problem, mirror, &(0..s.sequences).collect::<Vec<_>>())?
            }
            Operation::MergePartials => {
                let lse = [s.sequences, s.heads, s.tokens];
                let lse = DeviceTensor::contiguous(DType::F32, &lse)?;
                plan_merge_partials(&[q, q], &[lse, lse], &q, None)?
            }
            Operation::MergeMemories => plan_merge_memories(&[mirror], mirror)?,
            Operation::KeySums => plan_key_sums(&problem, &kv)?.0,
            Operation::SegmentMap | Operation::Compose | Operation::Apply => {
                let before = KeySumsMirror::zero(&problem, s.sequences);
                let (plan, first) = plan_segment_map(&problem, &kv, &kv, &before, &options)?;
                let (_, sums) = plan_key_sums(&problem, &kv)?;
                let (_, second) = plan_segment_map(&problem, &kv, &kv, &sums, &options)?;
                match self.operation {
                    Operation::SegmentMap => plan,
                    Operation::Compose => plan_compose(&first, &second)?.0,
                    _ => plan_apply(&first, mirror)?,
                }
            }
            _ => plan_prefill(&problem, &call, mirror, &options)?,
        })
    }
}

/// Passes on the launches of some operations, or of all when none is named.
struct Only<'a, 'd> {
    inner: &'a mut CudaLauncher<'d>,
    operations: &'a [&'a str],
}

impl Launcher for Only<'_, '_> {
    fn launch(&mut self, launch: &Launch<'_>) -> infini_attn::Result<()> {
        let wanted = self.operations.is_empty()
            || self.operations.iter().any(|o| launch.kernel.operation.starts_with(o));
        if wanted { self.inner.launch(launch) } else { Ok(()) }
    }

    fn fill(&mut self, to: u64, bytes: u64, value: u8) -> infini_attn::Result<()> {
        if self.operations.is_empty() { self.inner.fill(to, bytes, value) } else { Ok(()) }
    }

    fn copy(&mut self, to: u64, from: &[u8]) -> infini_attn::Result<()> {
        if self.operations.is_empty() { self.inner.copy(to, from) } else { Ok(()) }
    }
}
