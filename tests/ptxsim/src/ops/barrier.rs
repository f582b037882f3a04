//! bar, barrier: named barriers of a block.

use crate::context::Cx;

/// The named barriers of a block.
pub struct BlockState;

impl BlockState {
    /// Barriers of a block of `threads` threads.
    pub fn new(_threads: u32) -> Self {
        Self
    }
}

/// A warp has ended: barriers that waited only for it open.
pub fn warp_ended(_cx: &mut Cx<'_, '_>) {}
