//! wgmma.

/// Groups of a warp that have not been waited for.
#[derive(Default)]
pub struct WarpState;

/// What the warps of each warpgroup have executed.
#[derive(Default)]
pub struct GangState;
