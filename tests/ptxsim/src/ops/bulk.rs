//! cp.async.bulk: bulk and tensor copies, and their groups.

use crate::gang::State;
use crate::launch::Grid;

/// Copies not waited for.
#[derive(Default)]
pub struct GangState;

/// Performs one copy that was put off.
pub fn perform_one(_state: &mut State, _grid: &Grid<'_>) -> bool {
    false
}

/// cp.async.bulk.*
pub fn decode(
    _op: &mut crate::decode::Opcode<'_>,
    _env: &crate::decode::Env<'_>,
) -> crate::decode::Result<crate::program::Decoded> {
    Err("unknown opcode".into())
}
