//! Sequences of any lengths in one plan: the short ones are decoded, then the others prefilled.

use super::decode::{DecodeOptions, Runs, launches, plan_decode};
use super::prefill::{Prefill, PrefillOptions, once, plan_prefill};
use crate::call::MAX_DECODE_TOKENS;
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::Operand;
use crate::cuda::plan::allocation::Allocation;
use crate::cuda::plan::call::Call;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::sequences::{clear_padding, padding};
use crate::error::Result;
use crate::problem::Problem;

/// Plans [`forward`](crate::forward) on the device: a step of continuous batching.
///
/// # Errors
/// Those of [`plan_prefill`].
pub fn plan_forward(
    problem: &Problem,
    call: &Call<'_>,
    state: &Mirror,
    options: &PrefillOptions,
) -> Result<Plan> {
    options.target.check()?;
    let decoding = DecodeOptions { runs: Runs::Once, target: options.target };
    let all = call.resolve(problem, state, None)?;
    let long = |len: usize| len > MAX_DECODE_TOKENS;
    let (tokens, prompts) = (all.only(|len| !long(len)), all.only(long));
    if prompts.longest() == 0 {
        return plan_decode(problem, call, state, &decoding);
    }
    if tokens.longest() == 0 {
        return plan_prefill(problem, call, state, options);
    }
    let prefill = Prefill::new(&prompts, state, options)?;
    let title = format!("forward {}; {} after decoding", all.shapes(), prefill.extent());
    let mut plan = Plan::new(title, state.layout(), all.effect(once(&all, state)));
    // One after another in the same tables and arrays would do; they are small beside the runs.
    let mut workspace = Allocation::new(Operand::Workspace);
    launches(&tokens, state, &decoding, &mut plan, &mut workspace)?;
    prefill.launches(&prompts, state, &mut plan, &mut workspace)?;
    if let Some(sequences) = padding(&all, None, &mut plan, &mut workspace)? {
        clear_padding(&all, all.params(0), sequences, &mut plan)?;
    }
    Ok(plan.finish(all.requirements(), &workspace))
}
