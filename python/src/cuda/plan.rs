//! Calls planned for a device, and run: once, or for every layer of a model.

use infini_attn::Problem;
use infini_attn::cuda::{
    Addresses, Call, DecodeOptions, DeviceRope, DeviceTensor, Mirror, Operand, Plan, Runs,
    plan_decode, plan_forward, plan_merge_partials,
};
use pyo3::prelude::*;

use super::mirror::{DeviceState, enqueue};
use super::place::Place;
use super::python;
use super::tensors::{Given, address};
use crate::batch::{self, Batch};
use crate::{attend, error};

/// The tensors of a call, each an object in device memory or None.
#[derive(FromPyObject)]
pub struct Tensors<'py> {
    q: Bound<'py, PyAny>,
    k: Bound<'py, PyAny>,
    v: Bound<'py, PyAny>,
    beta: Bound<'py, PyAny>,
    out: Bound<'py, PyAny>,
    lse: Option<Bound<'py, PyAny>>,
    a_dot: Option<Bound<'py, PyAny>>,
    a_mem: Option<Bound<'py, PyAny>>,
    cos: Option<Bound<'py, PyAny>>,
    sin: Option<Bound<'py, PyAny>>,
}

/// Their descriptions and addresses.
struct Operands {
    q: Given,
    k: Given,
    v: Given,
    beta: Given,
    out: Given,
    lse: Option<Given>,
    a_dot: Option<Given>,
    a_mem: Option<Given>,
    cos: Option<Given>,
    sin: Option<Given>,
}

impl Operands {
    fn new(t: &Tensors<'_>) -> PyResult<Self> {
        let optional = Given::optional;
        Ok(Self {
            q: Given::new("q", Operand::Q, &t.q)?,
            k: Given::new("k", Operand::K, &t.k)?,
            v: Given::new("v", Operand::V, &t.v)?,
            beta: Given::new("beta", Operand::Gate, &t.beta)?,
            out: Given::new("out", Operand::O, &t.out)?,
            lse: optional("lse", Operand::Lse, t.lse.as_ref())?,
            a_dot: optional("a_dot", Operand::ADot, t.a_dot.as_ref())?,
            a_mem: optional("a_mem", Operand::AMem, t.a_mem.as_ref())?,
            cos: optional("rope.cos", Operand::Cos, t.cos.as_ref())?,
            sin: optional("rope.sin", Operand::Sin, t.sin.as_ref())?,
        })
    }

    /// Both tables or none, and positions only with them.
    fn check_tables(&self, positions: bool) -> PyResult<()> {
        if self.cos.is_some() != self.sin.is_some() {
            return Err(error::value("rope", "one table", "a tuple (cos, sin)"));
        }
        if positions && self.cos.is_none() {
            return Err(error::value("positions", "without rope", "rope=(cos, sin) with them"));
        }
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &Given> {
        let optional = [&self.lse, &self.a_dot, &self.a_mem, &self.cos, &self.sin];
        let needed = [&self.q, &self.k, &self.v, &self.beta, &self.out];
        needed.into_iter().chain(optional.into_iter().flatten())
    }
}

/// Which runs a plan is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One, from where the state stands; sequences of any length.
    Forward,
    /// The same, of at most 16 tokens.
    Decode,
    /// Any number from wherever the state stands, as in a graph.
    Replay,
    /// The same; a table in device memory has the slots and lengths.
    Table,
}

impl Kind {
    fn of(name: &str) -> PyResult<Self> {
        match name {
            "forward" => Ok(Self::Forward),
            "decode" => Ok(Self::Decode),
            "replay" => Ok(Self::Replay),
            "table" => Ok(Self::Table),
            _ => Err(error::value("kind", name, "forward, decode, replay or table")),
        }
    }
}

/// A call on a device, planned from shapes, strides and where the state stands. `run` enqueues it, also
/// on the states of other layers that stand alike.
#[pyclass(frozen, name = "_DevicePlan", module = "infini_attn._core")]
pub struct DevicePlan {
    plan: Plan,
    kind: Kind,
    tensors: Vec<(&'static str, Operand, DeviceTensor)>,
}

#[pymethods]
impl DevicePlan {
    /// Plans a call. `kind`: forward, decode, replay or table; `positions`: a list, or with
    /// `device_positions` as many int64 in device memory.
    #[staticmethod]
    #[pyo3(signature = (place, state, kind, tensors, *, seq_lens = None, attention_mask = None, cu_seqlens = None, slots = None, positions = None, device_positions = None, interleaved = false))]
    #[allow(clippy::too_many_arguments)]
    fn plan(
        place: &Bound<'_, PyAny>,
        state: &DeviceState,
        kind: &str,
        tensors: Tensors<'_>,
        seq_lens: Option<&Bound<'_, PyAny>>,
        attention_mask: Option<&Bound<'_, PyAny>>,
        cu_seqlens: Option<&Bound<'_, PyAny>>,
        slots: Option<&Bound<'_, PyAny>>,
        positions: Option<&Bound<'_, PyAny>>,
        device_positions: Option<usize>,
        interleaved: bool,
    ) -> PyResult<Self> {
        let operands = Operands::new(&tensors)?;
        operands.check_tables(positions.is_some() || device_positions.is_some())?;
        let given = batch::Given { seq_lens, attention_mask, cu_seqlens, slots };
        let batch = Batch::new(operands.q.tensor.shape(), given)?;
        let positions = positions.map(|p| attend::positions(p, batch.lead())).transpose()?;
        let mirror = state.read()?;
        let Operands { q, k, v, beta, out, .. } = &operands;
        let call = Call::new(q.tensor, k.tensor, v.tensor, beta.tensor, out.tensor);
        let mut call = batch.of_call(call);
        if let Some(lse) = Given::tensor(&operands.lse) {
            call = call.lse(lse);
        }
        if let Some(a_dot) = Given::tensor(&operands.a_dot) {
            call = call.a_dot(a_dot);
        }
        if let Some(a_mem) = Given::tensor(&operands.a_mem) {
            call = call.a_mem(a_mem);
        }
        if let (Some(cos), Some(sin)) = (&operands.cos, &operands.sin) {
            let mut rope = DeviceRope::new(cos.tensor, sin.tensor).interleaved(interleaved);
            match (&positions, device_positions) {
                (Some(positions), _) => rope = rope.positions(positions),
                (None, Some(count)) => rope = rope.device_positions(count),
                (None, None) => {}
            }
            call = call.rope(rope);
        }
        let (place, _current) = Place::of(place)?;
        let kind = Kind::of(kind)?;
        let plan = plan(&place, mirror.problem(), &call, &mirror, kind)?;
        let tensors = operands.all().map(|t| (t.name, t.operand, t.tensor)).collect();
        Ok(Self { plan, kind, tensors })
    }

    /// Enqueues the call with these tensors, of the shapes and strides it was planned for, on the state
    /// at `address`, whose counters move with it. Without `state` those on the device alone do: in a
    /// plan for any number of runs.
    #[pyo3(signature = (place, state, address, tensors, *, positions = None, table = None))]
    fn run(
        &self,
        place: &Bound<'_, PyAny>,
        state: Option<&DeviceState>,
        address: u64,
        tensors: Tensors<'_>,
        positions: Option<&Bound<'_, PyAny>>,
        table: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let operands = Operands::new(&tensors)?;
        let mut addresses = self.addresses(&operands)?;
        for (operand, object) in [(Operand::Positions, positions), (Operand::Sequences, table)] {
            if let Some(object) = object {
                addresses.set(operand, self::address(object)?);
            }
        }
        let (place, _current) = Place::of(place)?;
        let addresses = addresses.with(Operand::State, address);
        match (state, self.kind) {
            (Some(state), _) => state.run(&place, &self.plan, addresses),
            (None, Kind::Replay | Kind::Table) => {
                enqueue(&place, &self.plan, addresses).map_err(|stopped| stopped.error)
            }
            (None, _) => {
                let expected = "that which a plan for one run was made from";
                Err(error::value("state", "none", expected))
            }
        }
    }

    /// Loads the kernels of a run, which no capture allows.
    fn load(&self, place: &Bound<'_, PyAny>) -> PyResult<()> {
        let (place, _current) = Place::of(place)?;
        place.device().load(&self.plan).map_err(python)
    }

    fn __str__(&self) -> String {
        self.plan.to_string()
    }
}

impl DevicePlan {
    /// The addresses of a run; its tensors must be those of the plan in all but that.
    fn addresses(&self, operands: &Operands) -> PyResult<Addresses> {
        let mut addresses = Addresses::new();
        let mut given = operands.all();
        for (name, operand, planned) in &self.tensors {
            let tensor = given.next().filter(|given| given.operand == *operand);
            let Some(tensor) = tensor else {
                return Err(error::value(name, "none", "a tensor, as the plan has"));
            };
            if tensor.tensor != *planned {
                let show = |t: &DeviceTensor| {
                    format!("{} {:?}, strides {:?}", t.dtype(), t.shape(), t.strides())
                };
                let expected = format!("{}, as planned", show(planned));
                return Err(error::value(name, show(&tensor.tensor), expected));
            }
            addresses.set(tensor.operand, tensor.address);
        }
        match given.next() {
            Some(more) => Err(error::value(more.name, "a tensor", "none, as the plan has")),
            None => Ok(addresses),
        }
    }
}

fn plan(
    place: &Place<'_>,
    problem: &Problem,
    call: &Call<'_>,
    state: &Mirror,
    kind: Kind,
) -> PyResult<Plan> {
    let device = place.device();
    let decode = |runs| {
        let options = DecodeOptions { runs, target: device.target()? };
        plan_decode(problem, call, state, &options)
    };
    let planned = match kind {
        Kind::Forward => {
            device.prefill_options().and_then(|o| plan_forward(problem, call, state, &o))
        }
        Kind::Decode => decode(Runs::Once),
        Kind::Replay => decode(Runs::Replay),
        Kind::Table => decode(Runs::Table),
    };
    planned.map_err(python)
}

/// Enqueues `merge_partials` of lists of tensors into `out` and `out_lse`.
#[pyfunction]
pub fn _merge_partials_on(
    place: &Bound<'_, PyAny>,
    a_dot: Vec<Bound<'_, PyAny>>,
    lse: Vec<Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    out_lse: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let number = |i: usize| u16::try_from(i).unwrap_or(u16::MAX); // so many the plan refuses
    let given = |name, objects: &[Bound<'_, PyAny>], operand: fn(u16) -> Operand| {
        let each = |(i, object)| Given::new(name, operand(number(i)), object);
        objects.iter().enumerate().map(each).collect::<PyResult<Vec<_>>>()
    };
    let (a_dot, lse) =
        (given("a_dot", &a_dot, Operand::Part)?, given("lse", &lse, Operand::PartLse)?);
    let out = Given::new("out", Operand::O, out)?;
    let out_lse = Given::new("out_lse", Operand::Lse, out_lse)?;
    let tensors = |given: &[Given]| given.iter().map(|g| g.tensor).collect::<Vec<_>>();
    let (parts, logs) = (tensors(&a_dot), tensors(&lse));
    let plan = plan_merge_partials(&parts, &logs, &out.tensor, Some(&out_lse.tensor));
    let plan = plan.map_err(python)?;
    let all = a_dot.iter().chain(&lse).chain([&out, &out_lse]);
    let addresses = all.fold(Addresses::new(), |all, g| all.with(g.operand, g.address));
    let (place, _current) = Place::of(place)?;
    enqueue(&place, &plan, addresses).map_err(|stopped| stopped.error)
}
