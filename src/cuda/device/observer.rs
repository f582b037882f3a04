//! Whoever wants to know what a device is told to do.

use std::fmt;
use std::sync::Arc;

use crate::cuda::plan::launcher::Launch;

/// What a [`Device`](super::Device) is told to do, in the order of the calls.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// This launch is enqueued next.
    Launch(&'a Launch<'a>),
    /// Everything enqueued before is done.
    Waited,
}

/// One who is told of every [`Event`].
type Observer = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

/// All of them.
#[derive(Clone, Default)]
pub(super) struct Observers(pub Vec<Observer>);

impl Observers {
    pub fn tell(&self, event: Event<'_>) {
        self.0.iter().for_each(|observer| observer(&event));
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Observers({})", self.0.len())
    }
}
