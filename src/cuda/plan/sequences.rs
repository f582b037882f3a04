//! Sequences of a launch: in its parameters where they fit, else in a table.

use bytemuck::Zeroable;

use super::Plan;
use super::address::{Bytes, Operand};
use super::allocation::Allocation;
use super::call::Resolved;
use super::kernel::Arch;
use super::kernels::find;
use super::params::*;
use super::problem::problem_params;
use crate::error::Result;

/// A list of sequences as launch parameter; a long one is copied to the workspace.
pub fn listed(
    all: &[InfiniSequence],
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<InfiniSequences> {
    let mut params = InfiniSequences::zeroed();
    params.count = all.len() as i32;
    params.max_len = all.iter().map(|s| s.len).max().unwrap_or(0);
    match params.inline_sequences.get_mut(..all.len()) {
        Some(inline) => {
            inline.copy_from_slice(all);
            params.in_line = 1;
        }
        None => {
            params.table = workspace.part(&[all.len()], size_of::<InfiniSequence>())?;
            plan.copy(params.table, Bytes::plain(all));
        }
    }
    Ok(params)
}

/// A call's sequences as launch parameter; `table`: they come from the caller's device memory, with
/// at most so many new tokens each.
pub fn sequences(
    call: &Resolved<'_>,
    table: Option<usize>,
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<InfiniSequences> {
    let mut params = if table.is_some() {
        let (table, count) = (Operand::Sequences.at(0), call.sequences.len() as i32);
        InfiniSequences { table, count, ..Zeroable::zeroed() }
    } else if call.identity() {
        InfiniSequences { count: call.sequences.len() as i32, ..Zeroable::zeroed() }
    } else {
        let all: Vec<_> = (call.sequences.iter())
            .map(|s| InfiniSequence {
                first: s.first as i64,
                slot: s.slot as i32,
                batch: s.batch as i32,
                len: s.len as i32,
                reserved: 0,
            })
            .collect();
        listed(&all, plan, workspace)?
    };
    params.tokens = call.tokens() as i32;
    params.max_len = table.unwrap_or(call.longest()) as i32;
    Ok(params)
}

/// The sequences of a call that has padding to clear, or may have it (`table`, as above).
pub fn padding(
    call: &Resolved<'_>,
    table: Option<usize>,
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<Option<InfiniSequences>> {
    let short = table.is_some() || call.sequences.iter().any(|s| s.len < call.tokens());
    (!call.packed() && short).then(|| sequences(call, table, plan, workspace)).transpose()
}

/// Output rows of padding become 0.
pub fn clear_padding(
    call: &Resolved<'_>,
    params: InfiniCall,
    sequences: InfiniSequences,
    plan: &mut Plan,
) -> Result<()> {
    let p = &call.problem;
    let grid = [call.tokens().div_ceil(8), p.heads(), sequences.count as usize];
    let params = InfiniClearPadding { problem: problem_params(p), call: params, sequences };
    plan.launch(find("clear_padding", p, Arch::Sm80)?, grid, params, "output rows of padding")
}
