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

/// None, or one that is told of every [`Event`].
#[derive(Clone, Default)]
pub(super) struct Observer(pub Option<Arc<dyn Fn(&Event<'_>) + Send + Sync>>);

impl Observer {
    pub fn tell(&self, event: Event<'_>) {
        if let Some(observer) = &self.0 {
            observer(&event);
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Observer" } else { "none" })
    }
}
