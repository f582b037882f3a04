//! barrier.cluster.

use crate::context::Cx;

/// The cluster barriers of a gang.
#[derive(Default)]
pub struct GangState;

/// A warp has ended: a barrier that waited only for it opens.
pub fn warp_ended(_cx: &mut Cx<'_, '_>) {}
