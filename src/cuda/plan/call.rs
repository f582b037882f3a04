//! One call's arguments, described; their checks; their translation into launch parameters.

use super::Plan;
use super::address::{Bytes, Operand, Requirement};
use super::allocation::Allocation;
use super::effect::{Effect, Kind, Tokens};
use super::kernel::Arch;
use super::kernels::find;
use super::mirror::Mirror;
use super::params::*;
use super::tensor::{DeviceTensor, ROW_ALIGN};
use crate::call::builders::{input_builders, output_builders, rope_builders};
use crate::call::check::{check_longest, dtype_is};
use crate::call::form::{Form, Gate, Lengths, OutputForm, Positions, RopeForm, Sequence};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::problem::Problem;

/// Queries, keys, values, gate and outputs of one call, and its batch layout, without any address:
/// what [`Inputs`](crate::Inputs) and [`Outputs`](crate::Outputs) are for the host.
///
/// q [B, T, Hq, Dk], k [B, T, Hkv, Dk], v [B, T, Hkv, Dv], **unrotated**; gate f32 `[Hq]`; o [B, T,
/// Hq, Dv]. The last dimension is contiguous, rows start at multiples of 16 bytes, strides are
/// otherwise free. A NaN among the gate's logits makes the rows of its head NaN.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub(crate) q: DeviceTensor,
    pub(crate) k: DeviceTensor,
    pub(crate) v: DeviceTensor,
    gate: DeviceTensor,
    o: DeviceTensor,
    lse: Option<DeviceTensor>,
    a_dot: Option<DeviceTensor>,
    a_mem: Option<DeviceTensor>,
    lengths: Lengths<'a>,
    slots: Option<&'a [usize]>,
    rope: Option<DeviceRope<'a>>,
}

impl<'a> Call<'a> {
    /// A batch in which every sequence is T tokens long and sequence b uses slot b of the state.
    pub fn new(
        q: DeviceTensor,
        k: DeviceTensor,
        v: DeviceTensor,
        gate: DeviceTensor,
        o: DeviceTensor,
    ) -> Self {
        Self {
            q,
            k,
            v,
            gate,
            o,
            lse: None,
            a_dot: None,
            a_mem: None,
            lengths: Lengths::Full,
            slots: None,
            rope: None,
        }
    }

    input_builders!('a, DeviceRope<'a>);
    output_builders!(DeviceTensor, DeviceTensor);

    /// Everything the CPU backend checks, in its order and with its errors, then what only device
    /// memory asks for.
    pub(crate) fn resolve(
        &self,
        problem: &Problem,
        state: &Mirror,
        max_tokens: Option<usize>,
    ) -> Result<Resolved<'_>> {
        problem.check_same(state.problem())?;
        find("segment_attention", problem, Arch::Sm80)?;
        if self.gate.shape().len() != 1 {
            return Err(Error::shape("gate", self.gate.shape(), "[Hq]"));
        }
        let form = Form {
            q: self.q.layout(),
            k: self.k.layout(),
            v: self.v.layout(),
            gate: Gate::Device(self.gate.shape()[0]),
            lengths: self.lengths,
            slots: self.slots,
            rope: self.rope.as_ref().map(DeviceRope::form),
        };
        let sequences = form.resolve(problem, state.counters())?;
        dtype_is("q", self.q.dtype(), problem.dtype())?;
        let outputs = OutputForm {
            o: self.o.layout(),
            lse: self.lse.map(|t| t.layout()),
            a_dot: self.a_dot.map(|t| t.layout()),
            a_mem: self.a_mem.map(|t| t.layout()),
        };
        outputs.check(problem, &form.q)?;
        check_longest(&sequences, max_tokens)?;
        self.check_device(problem, state)?;
        Ok(Resolved { problem: *problem, call: self, form, sequences })
    }

    /// Element types, alignment, and what has to fit the parameters' 32-bit numbers.
    fn check_device(&self, problem: &Problem, state: &Mirror) -> Result<()> {
        let outputs = self.outputs();
        let writable = outputs.iter().filter_map(|(name, _, t)| Some((*name, (*t)?)));
        for (name, tensor) in [("k", self.k), ("v", self.v)].into_iter().chain(writable.clone()) {
            let expected = if name == "lse" { DType::F32 } else { problem.dtype() };
            dtype_is(name, tensor.dtype(), expected)?;
        }
        dtype_is("gate", self.gate.dtype(), DType::F32)?;
        self.gate.layout().check_rows("gate")?;
        for (name, tensor) in writable.clone() {
            tensor.layout().check_injective(name)?;
        }
        let inputs = [("q", self.q), ("k", self.k), ("v", self.v)];
        for (name, tensor) in inputs.into_iter().chain(writable).filter(|(n, _)| *n != "lse") {
            tensor.check_row_align(name)?;
        }
        let tokens = self.q.shape()[self.q.shape().len() - 3];
        if i32::try_from(tokens).is_err() {
            return Err(Error::value("q (tokens)", tokens, format!("at most {}", i32::MAX)));
        }
        let Some(rope) = &self.rope else { return Ok(()) };
        dtype_is("rope.cos", rope.cos.dtype(), DType::F32)?;
        dtype_is("rope.sin", rope.sin.dtype(), DType::F32)?;
        if !state.layout().rotation() {
            let expected = "a state with room for rotated keys";
            return Err(Error::value("rope", "a rotation", expected));
        }
        Ok(())
    }

    /// Name, operand and description of every output.
    fn outputs(&self) -> [(&'static str, Operand, Option<DeviceTensor>); 4] {
        [
            ("o", Operand::O, Some(self.o)),
            ("lse", Operand::Lse, self.lse),
            ("a_dot", Operand::ADot, self.a_dot),
            ("a_mem", Operand::AMem, self.a_mem),
        ]
    }
}

/// [`Rope`](crate::Rope) for device memory: f32 tables [positions, R/2] and positions. Rotation is
/// fastest when R is a multiple of 16 and the tables' rows start at multiples of 16 bytes.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRope<'a> {
    cos: DeviceTensor,
    sin: DeviceTensor,
    interleaved: bool,
    positions: Positions<'a>,
}

impl<'a> DeviceRope<'a> {
    /// Channel i pairs with i + R/2; the row of a token is its absolute position, continued from the
    /// state.
    pub fn new(cos: DeviceTensor, sin: DeviceTensor) -> Self {
        Self { cos, sin, interleaved: false, positions: Positions::Continued }
    }

    rope_builders!('a);

    /// The same, i64 at [`Operand::Positions`] in device memory: read and checked there. A sequence
    /// with a position outside the tables is taken in without rotation there and the status word is set.
    pub fn device_positions(mut self, count: usize) -> Self {
        self.positions = Positions::Device(count);
        self
    }

    fn form(&self) -> RopeForm<'a> {
        RopeForm { cos: self.cos.layout(), sin: self.sin.layout(), positions: self.positions }
    }
}

/// A call whose every argument was checked.
pub(crate) struct Resolved<'a> {
    pub problem: Problem,
    call: &'a Call<'a>,
    form: Form<'a>,
    pub sequences: Vec<Sequence>,
}

impl<'a> Resolved<'a> {
    /// The same call without the tokens of sequences whose number of tokens is not wanted.
    pub fn only(&self, wanted: impl Fn(usize) -> bool) -> Self {
        let len = |s: &Sequence| if wanted(s.len) { s.len } else { 0 };
        let sequences = self.sequences.iter().map(|s| Sequence { len: len(s), ..*s }).collect();
        Self { sequences, ..*self }
    }

    pub fn a_mem(&self) -> bool {
        self.call.a_mem.is_some()
    }

    pub fn k(&self) -> InfiniTensor {
        self.call.k.rows(Operand::K)
    }

    pub fn v(&self) -> InfiniTensor {
        self.call.v.rows(Operand::V)
    }

    /// Padded length of the token dimension.
    pub fn tokens(&self) -> usize {
        self.form.tokens()
    }

    pub fn packed(&self) -> bool {
        self.form.packed()
    }

    /// B and T; packed: 1 and all tokens.
    pub fn lead(&self) -> [usize; 2] {
        let batches = if self.packed() { 1 } else { self.form.q.shape()[0] };
        [batches, self.tokens()]
    }

    /// Whether sequence b is batch b in slot b, all T tokens of it.
    pub fn identity(&self) -> bool {
        let short = |s: &Sequence| s.len != self.tokens();
        self.form.slots.is_none() && !self.packed() && !self.sequences.iter().any(short)
    }

    /// New tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.sequences.iter().map(|s| s.len).max().unwrap_or(0)
    }

    /// Rows of the rotation tables, and whether positions continue from the state.
    pub fn rotation(&self) -> Option<(usize, bool)> {
        let rope = self.form.rope?;
        Some((rope.cos.shape()[0], matches!(rope.positions, Positions::Continued)))
    }

    /// Positions that every run copies to the device.
    pub fn positions(&self) -> Option<&'a [i64]> {
        match self.form.rope?.positions {
            Positions::Given(positions) => Some(positions),
            _ => None,
        }
    }

    /// What a run does to the counters.
    pub fn effect(&self, kind: Kind) -> Effect {
        let sequences = self.sequences.iter().map(|s| (s.slot, s.len)).collect();
        Effect::Tokens(Tokens { sequences, rotation: self.rotation(), kind })
    }

    /// Copies given positions to the workspace; the call as launch parameter.
    pub fn copy_positions(
        &self,
        plan: &mut Plan,
        workspace: &mut Allocation,
    ) -> Result<InfiniCall> {
        let Some(positions) = self.positions() else { return Ok(self.params(0)) };
        let at = workspace.part(&[positions.len()], size_of::<i64>())?;
        plan.copy(at, Bytes::plain(positions));
        Ok(self.params(at))
    }

    /// The call as launch parameter; `positions` is where given positions were copied to.
    pub fn params(&self, positions: u64) -> InfiniCall {
        let c = self.call;
        let optional = |t: Option<DeviceTensor>, operand| {
            t.map_or_else(InfiniTensor::default, |t| t.rows(operand))
        };
        InfiniCall {
            q: c.q.rows(Operand::Q),
            k: self.k(),
            v: self.v(),
            o: c.o.rows(Operand::O),
            a_dot: optional(c.a_dot, Operand::ADot),
            a_mem: optional(c.a_mem, Operand::AMem),
            lse: c.lse.map_or_else(InfiniTensor::default, |t| t.head_rows(Operand::Lse)),
            gate: Operand::Gate.at(0),
            rope: self.rope(positions),
        }
    }

    /// The rotation as launch parameter.
    pub fn rope(&self, positions: u64) -> InfiniRope {
        let (Some(rope), Some(form)) = (&self.call.rope, &self.form.rope) else {
            return InfiniRope::default();
        };
        let per_batch = |count| if self.form.shared(count) { 0 } else { self.tokens() as i64 };
        let (positions, positions_batch) = match form.positions {
            Positions::Continued => (0, 0),
            Positions::Given(list) => (positions, per_batch(list.len())),
            Positions::Device(count) => (Operand::Positions.at(0), per_batch(count)),
        };
        let table = |tensor: &DeviceTensor, operand: Operand| {
            if tensor.layout().is_empty() { 0 } else { operand.at(0) }
        };
        InfiniRope {
            cos: table(&rope.cos, Operand::Cos),
            sin: table(&rope.sin, Operand::Sin),
            cos_stride: rope.cos.outer_stride(),
            sin_stride: rope.sin.outer_stride(),
            positions,
            positions_batch,
            rows: rope.cos.shape()[0] as i64,
            half: rope.cos.shape()[1] as i32,
            interleaved: rope.interleaved.into(),
        }
    }

    /// What a run must give for the call's tensors.
    pub fn requirements(&self) -> Vec<Requirement> {
        let c = self.call;
        let mut all = vec![
            c.q.requirement(Operand::Q, ROW_ALIGN),
            c.k.requirement(Operand::K, ROW_ALIGN),
            c.v.requirement(Operand::V, ROW_ALIGN),
            c.gate.requirement(Operand::Gate, size_of::<f32>()),
        ];
        for (name, operand, tensor) in c.outputs() {
            let align = if name == "lse" { size_of::<f32>() } else { ROW_ALIGN };
            all.push(tensor.and_then(|t| t.requirement(operand, align)));
        }
        if let Some(rope) = &c.rope {
            all.push(rope.cos.requirement(Operand::Cos, size_of::<f32>()));
            all.push(rope.sin.requirement(Operand::Sin, size_of::<f32>()));
            if let Positions::Device(count) = rope.positions
                && count > 0
            {
                let (align, after) = (8, 8 * count as u64);
                let operand = Operand::Positions;
                all.push(Some(Requirement { operand, align, before: 0, after }));
            }
        }
        all.into_iter().flatten().collect()
    }

    /// Heads, dimensions and tokens, for messages and titles.
    pub fn shapes(&self) -> String {
        let p = &self.problem;
        let count = self.sequences.len();
        let shortest = self.sequences.iter().map(|s| s.len).min().unwrap_or(0);
        let range = if shortest == self.longest() {
            format!("{shortest}")
        } else {
            format!("{shortest} to {}", self.longest())
        };
        format!("{}; sequences: {count}, new tokens: {range}", p.shapes())
    }
}
