//! Whoever wants to know what a device is told to do.

use std::fmt;
use std::sync::Arc;

use super::Launch;

/// What a [`Device`](super::Device) is told to do, in the order of the calls.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// This launch is enqueued next.
    Launch(&'a Launch<'a>),
    /// Everything enqueued before is done.
    Waited,
}

/// All who are told of every [`Event`].
#[derive(Clone, Default)]
pub(super) struct Observers(pub Vec<Arc<dyn Fn(&Event<'_>) + Send + Sync>>);

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
