//! Merges of partial results and of states, in device memory.

use cudarc::driver::DeviceRepr;

use super::Device;
use super::buffers::{Operands, TensorView, TensorViewMut};
use super::state::State;
use crate::call::merge::no_states;
use crate::cuda::operations::merge::{plan_merge_memories, plan_merge_partials};
use crate::cuda::plan::address::{Addresses, Operand};
use crate::dtype::Element;
use crate::error::Result;
use crate::trace::{Span, span};

/// [`crate::merge_partials`] on the device's stream.
///
/// # Errors
/// Those of [`crate::merge_partials`] and of [`plan_merge_partials`]; the device's.
pub fn merge_partials<T: Element + DeviceRepr>(
    device: &Device,
    a_dot: &[TensorView<'_, T>],
    lse: &[TensorView<'_, f32>],
    out: TensorViewMut<'_, T>,
    out_lse: Option<TensorViewMut<'_, f32>>,
) -> Result<()> {
    let span =
        span!("merge_partials", format_args!("{} parts, {:?}", a_dot.len(), out.tensor().shape()));
    span.run(|| merge_rows(&span, device, a_dot, lse, out, out_lse))
}

fn merge_rows<T: Element + DeviceRepr>(
    span: &Span,
    device: &Device,
    a_dot: &[TensorView<'_, T>],
    lse: &[TensorView<'_, f32>],
    mut out: TensorViewMut<'_, T>,
    mut out_lse: Option<TensorViewMut<'_, f32>>,
) -> Result<()> {
    device.refuse_capture("a merge", "record the plan of plan_merge_partials")?;
    let parts: Vec<_> = a_dot.iter().map(|view| view.tensor()).collect();
    let logs: Vec<_> = lse.iter().map(|view| view.tensor()).collect();
    let log = out_lse.as_ref().map(|view| view.tensor());
    let plan = plan_merge_partials(&parts, &logs, &out.tensor(), log.as_ref())?;
    plan.note(span);
    let mut operands = Operands::new(device)?;
    // The plan has refused lists that an index does not reach.
    for (i, (a_dot, lse)) in (0u16..).zip(a_dot.iter().zip(lse)) {
        operands.read(Operand::Part(i), a_dot)?;
        operands.read(Operand::PartLse(i), lse)?;
    }
    operands.write(Operand::O, &mut out)?;
    if let Some(out_lse) = &mut out_lse {
        operands.write(Operand::Lse, out_lse)?;
    }
    operands.ordered()?;
    device.run(&plan, operands.addresses.clone())?;
    operands.finish()
}

/// [`crate::merge_memories`] on the states' stream: the state over all their tokens.
///
/// # Errors
/// Those of [`crate::merge_memories`]; [`crate::Error::Value`] for states of several streams; the
/// device's.
pub fn merge_memories(states: &[&State]) -> Result<State> {
    let span = span!("merge_memories", format_args!("{} states", states.len()));
    span.run(|| sum_states(&span, states))
}

fn sum_states(span: &Span, states: &[&State]) -> Result<State> {
    let Some((last, earlier)) = states.split_last() else {
        return Err(no_states());
    };
    let mirrors: Vec<_> = earlier.iter().map(|state| state.mirror()).collect();
    let plan = plan_merge_memories(&mirrors, last.mirror())?;
    plan.note(span);
    for (i, state) in earlier.iter().enumerate() {
        last.device().check_stream(&format!("states[{i}]"), state.device())?;
    }
    let mut merged = last.fork(&(0..last.sequences()).collect::<Vec<_>>())?;
    let mut addresses = Addresses::new();
    for (i, state) in (0u16..).zip(earlier) {
        addresses.set(Operand::Source(i), state.address());
    }
    merged.advance_with(&plan, addresses)?;
    Ok(merged)
}
