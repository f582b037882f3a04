//! Gradients of a call on the CPU, in candle's graph: one operation with q, k and v, behind it one with the
//! gate, whose backward pass, the first of both, computes everything.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, WithDType,
};
use infini_attn::{
    Element, InputGradients, Inputs, OutputGradients, Problem, StateGradient, Tape, TensorView,
    TensorViewMut, prefill_backward,
};

use crate::batch::{Batch, Lengths, Rope};
use crate::cpu::{rotation, view};
use crate::error::{refused, wrapped, zeros};
use crate::operator::{NAME, Output, Rotation, described, lse_shape};

/// What a call leaves for its gradients besides its tensors.
#[derive(Default)]
pub(crate) struct Record {
    pub tape: Tape,
    /// Log-sum-exp, [B, Hq, T] or packed [Hq, total].
    pub lse: Vec<f32>,
}

/// A call that is over.
pub(crate) struct Recorded {
    problem: Problem,
    record: Record,
    /// Readable, outside the graph.
    qkv: [Tensor; 3],
    gate: Tensor,
    lengths: OwnLengths,
    slots: Option<Vec<usize>>,
    rope: Option<Rope>,
    positions: Vec<i64>,
    /// Gradients to q, k and v, from one operation's backward pass to the other's, which is in the same thread.
    computed: Mutex<Option<(ThreadId, [Tensor; 3])>>,
}

enum OwnLengths {
    Full,
    Padded(Vec<i32>),
    Ranges(Vec<Range<i32>>),
    Packed(Vec<i32>),
}

impl Recorded {
    pub fn new(
        problem: Problem,
        record: Record,
        qkv: [Tensor; 3],
        gate: Tensor,
        batch: &Batch<'_>,
        positions: &[i64],
    ) -> Self {
        let lengths = match batch.lengths {
            Lengths::Full => OwnLengths::Full,
            Lengths::Padded(lens) => OwnLengths::Padded(lens.to_vec()),
            Lengths::Ranges(ranges) => OwnLengths::Ranges(ranges.to_vec()),
            Lengths::Packed(cu) => OwnLengths::Packed(cu.to_vec()),
        };
        let (slots, rope) = (batch.slots.map(<[usize]>::to_vec), batch.rope.cloned());
        let (positions, computed) = (positions.to_vec(), Mutex::default());
        Self { problem, record, qkv, gate, lengths, slots, rope, positions, computed }
    }

    fn batch(&self) -> Batch<'_> {
        let lengths = match &self.lengths {
            OwnLengths::Full => Lengths::Full,
            OwnLengths::Padded(lens) => Lengths::Padded(lens),
            OwnLengths::Ranges(ranges) => Lengths::Ranges(ranges),
            OwnLengths::Packed(cu) => Lengths::Packed(cu),
        };
        Batch { lengths, slots: self.slots.as_deref(), ..Batch::new() }
    }

    /// Gradients to q, k and v, and to the gate.
    fn gradients(&self, o: &Tensor, d_o: &Tensor) -> Result<([Tensor; 3], Tensor)> {
        match o.dtype() {
            DType::F32 => self.gradients_of::<f32>(o, d_o),
            DType::F16 => self.gradients_of::<half::f16>(o, d_o),
            DType::BF16 => self.gradients_of::<half::bf16>(o, d_o),
            other => unreachable!("{other:?}: types were compared"),
        }
    }

    fn gradients_of<T: Element + WithDType>(
        &self,
        o: &Tensor,
        d_o: &Tensor,
    ) -> Result<([Tensor; 3], Tensor)> {
        let d_o = d_o.contiguous()?;
        let tensors = [&self.qkv[0], &self.qkv[1], &self.qkv[2], o, &d_o, &self.gate];
        let read = tensors.map(Tensor::storage_and_layout);
        let storage = |i: usize| match &*read[i].0 {
            Storage::Cpu(storage) => Ok((storage, read[i].1)),
            _ => Err(refused("q", "a tensor on another device", "one on Cpu")),
        };
        let rows = |i: usize| {
            let (storage, layout) = storage(i)?;
            view::<T>(storage.as_slice()?, layout)
        };
        let (gate, at) = storage(5)?;
        let gate = &gate.as_slice::<f32>()?[at.start_offset()..][..self.problem.heads()];
        let rope = self.rope.as_ref().map(Rotation::new);
        let rope = rope.as_ref().map(|rope| rotation(rope, &self.positions)).transpose()?;
        let inputs = described!(Inputs::new(rows(0)?, rows(1)?, rows(2)?), self.batch(), rope);
        let lse = TensorView::new(&self.record.lse, &lse_shape(o.dims())).map_err(wrapped)?;
        let outputs = OutputGradients::new(rows(3)?, lse, rows(4)?);

        let shapes = self.qkv.each_ref().map(Tensor::dims);
        let [mut dq, mut dk, mut dv] = [
            zeros::<T>(shapes[0], "the gradient to q")?,
            zeros::<T>(shapes[1], "the gradient to k")?,
            zeros::<T>(shapes[2], "the gradient to v")?,
        ];
        let mut d_gate = zeros::<f32>(&[self.problem.heads()], "the gradient to the gate")?;
        let into = |x, shape| TensorViewMut::new(x, shape).map_err(wrapped);
        let gradients = InputGradients::new(
            into(&mut dq, shapes[0])?,
            into(&mut dk, shapes[1])?,
            into(&mut dv, shapes[2])?,
            &mut d_gate,
        );
        // The state before the call is a constant.
        let slots = self.record.tape.slots().unwrap_or(0);
        let mut state = StateGradient::new(&self.problem, slots).map_err(wrapped)?;
        let tape = &self.record.tape;
        prefill_backward(&self.problem, &inputs, gate, tape, &outputs, &mut state, gradients)
            .map_err(wrapped)?;
        let device = o.device();
        let [q, k, v] = [(dq, shapes[0]), (dk, shapes[1]), (dv, shapes[2])]
            .map(|(x, shape)| Tensor::from_vec(x, shape, device));
        Ok(([q?, k?, v?], Tensor::from_vec(d_gate, self.problem.heads(), device)?))
    }
}

/// The output of a call, in the graph behind its inputs.
pub(crate) fn put(
    output: Output<Storage>,
    [q, k, v]: [&Tensor; 3],
    gate: &Tensor,
    recorded: Recorded,
) -> Result<Tensor> {
    let recorded = Arc::new(recorded);
    let op = OfTensors { recorded: recorded.clone(), output: Mutex::new(Some(output)) };
    let o = q.apply_op3(k, v, op)?;
    match gate.track_op() {
        true => o.apply_op2(gate, OfGate { recorded }),
        false => Ok(o),
    }
}

/// The operation with q, k and v.
struct OfTensors {
    recorded: Arc<Recorded>,
    output: Mutex<Option<Output<Storage>>>,
}

impl CustomOp3 for OfTensors {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        match output.expect("candle computes an operation once") {
            (Storage::Cpu(storage), shape) => Ok((storage, shape.into())),
            _ => unreachable!("computed where the inputs are"),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        o: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let computed = self.recorded.computed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let own = computed.filter(|(thread, _)| *thread == thread::current().id());
        let [q, k, v] = match own {
            Some((_, gradients)) => gradients,
            None => self.recorded.gradients(o, d_o)?.0,
        };
        Ok((Some(q), Some(k), Some(v)))
    }
}

/// The operation with the gate; forward it does nothing.
struct OfGate {
    recorded: Arc<Recorded>,
}

impl CustomOp2 for OfGate {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        o: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((o.clone(), layout.shape().clone()))
    }

    fn bwd(
        &self,
        o: &Tensor,
        _: &Tensor,
        _: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (computed, gate) = self.recorded.gradients(o, d_o)?;
        if o.track_op() {
            let computed = Some((thread::current().id(), computed));
            *self.recorded.computed.lock().unwrap_or_else(PoisonError::into_inner) = computed;
        }
        Ok((Some(d_o.clone()), Some(gate)))
    }
}
