//! What a call needs besides its arguments and the state. It is kept from one call to the next, so that
//! decoding allocates nothing.

use std::sync::Mutex;

use super::decode;
use super::pool::Pool;
use crate::call::check::Tables;

/// Buffers of one call at a time.
#[derive(Default)]
pub(super) struct Workspace {
    pub tables: Tables,
    pub gates: Vec<[f32; 2]>,
    pub decoding: Pool<decode::Scratch>,
    /// Scratch that the last decode had no use for.
    pub spare: Vec<decode::Scratch>,
}

/// Workspaces that no call uses: about as many as calls have run at once.
static IDLE: Mutex<Vec<Workspace>> = Mutex::new(Vec::new());

/// Most of them.
const MOST: usize = 16;

/// A buffer of more bytes is not kept: its call takes so long that allocating does not count.
const KEPT_BYTES: usize = 4 << 20;

impl Workspace {
    /// One of an earlier call, or a new one. It never waits: in a process that was forked while another
    /// thread held the lock, nobody would ever give it back.
    pub fn take() -> Self {
        IDLE.try_lock().ok().and_then(|mut idle| idle.pop()).unwrap_or_default()
    }

    /// Keeps it for another call.
    pub fn keep(mut self) {
        let small = |x: &decode::Scratch| x.bytes() <= KEPT_BYTES;
        self.decoding.all().retain(small);
        self.spare.retain(small);
        if self.tables.bytes() > KEPT_BYTES {
            self.tables = Tables::default();
        }
        if size_of::<[f32; 2]>() * self.gates.capacity() > KEPT_BYTES {
            self.gates = Vec::new();
        }
        let Ok(mut idle) = IDLE.try_lock() else { return };
        if idle.len() < MOST && idle.try_reserve(1).is_ok() {
            idle.push(self);
        }
    }
}
