//! Where the parts of a pool of states lie in device memory.

use super::address::{Addresses, Operand, Parameters};
use super::allocation::Allocation;
use super::kernel::Arch;
use super::kernels::find;
use super::params::*;
use crate::error::{Error, Result};
use crate::memory::Counters;
use crate::problem::Problem;

/// Where the parts of a pool of states lie in one allocation, each at a multiple of 256 bytes:
/// memory and normaliser, the 16-bit form of the memory that retrievals read, open segments,
/// counters, status word, and the tickets that blocks exchange.
///
/// ```no_run
/// use infini_attn::{DType, Problem, cuda::StateLayout};
/// let problem = Problem::builder().head_dim(128).dtype(DType::BF16).build()?;
/// let layout = StateLayout::new(&problem, 64, true)?;
/// let memory = layout.params(0x7f00_0000_0000).memory; // of an allocation of layout.bytes()
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct StateLayout {
    problem: Problem,
    slots: usize,
    rotation: bool,
    bytes: u64,
    /// Symbols, as those of the tickets.
    state: InfiniState,
    head_tickets: u64,
    sequence_tickets: u64,
}

impl PartialEq for StateLayout {
    fn eq(&self, other: &Self) -> bool {
        // Everything else follows from these.
        (&self.problem, self.slots, self.rotation) == (&other.problem, other.slots, other.rotation)
    }
}

impl StateLayout {
    /// The layout of `slots` states; `rotation`: with room for rotated keys, which a call with
    /// [`rope`](crate::cuda::Call::rope) needs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when no kernels are compiled for the problem, [`Error::Value`] for more
    /// than 2^31 − 1 slots or 2^47 bytes.
    pub fn new(problem: &Problem, slots: usize, rotation: bool) -> Result<Self> {
        find("segment_attention", problem, Arch::Sm80)?;
        if i32::try_from(slots).is_err() {
            return Err(Error::value("slots", slots, format!("at most {}", i32::MAX)));
        }
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        let (n, t) = (problem.segment_len(), problem.dtype().bytes());
        let scales = dv / INFINI_SCALE_COLUMNS as usize;
        let mut all = Allocation::new(Operand::State);
        let state = InfiniState {
            memory: all.part(&[slots, h, dk, dv], 4)?,
            normalizer: all.part(&[slots, h, dk], 4)?,
            snapshot: all.part(&[slots, h, dk, dv], t)?,
            snapshot_scale: all.part(&[slots, h, scales], 4)?,
            open_k: all.part(&[slots, h, n, dk], t)?,
            open_k_rotated: if rotation { all.part(&[slots, h, n, dk], t)? } else { 0 },
            open_v: all.part(&[slots, h, n, dv], t)?,
            counters: all.part(&[slots], size_of::<InfiniCounters>())?,
            status: all.part(&[1], 4)?,
            slots: slots as i64,
        };
        let (head_tickets, sequence_tickets) =
            (all.part(&[slots, h, problem.group()], 4)?, all.part(&[slots], 4)?);
        let (problem, bytes) = (*problem, all.bytes());
        Ok(Self { problem, slots, rotation, bytes, state, head_tickets, sequence_tickets })
    }

    /// The problem its states belong to.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Whether there is room for rotated keys.
    pub fn rotation(&self) -> bool {
        self.rotation
    }

    /// Bytes of the allocation ([`Problem::state_bytes`] is that of the host); its address must be a
    /// multiple of 256.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The addresses of every part in an allocation at `address`; with 0 their offsets. Rotated keys
    /// without room are absent, 0.
    pub fn params(&self, address: u64) -> InfiniState {
        let addresses = Addresses::new().with(Operand::State, address);
        let mut state = self.state;
        state.addresses(&mut |symbol| *symbol = addresses.resolve(*symbol));
        state
    }

    /// The offsets of the tickets that blocks exchange, u32 [slots, Hkv, Hq / Hkv] and `[slots]`, 0 between
    /// calls.
    pub fn tickets(&self) -> [u64; 2] {
        let offsets = Addresses::new();
        [self.head_tickets, self.sequence_tickets].map(|symbol| offsets.resolve(symbol))
    }

    /// The same as symbols.
    pub(crate) fn symbols(&self) -> InfiniState {
        self.state
    }

    /// The same of a state at another operand than [`Operand::State`].
    pub(crate) fn symbols_at(&self, operand: Operand) -> InfiniState {
        let (mut state, offsets) = (self.state, Addresses::new());
        state.addresses(&mut |symbol| {
            if *symbol != 0 {
                *symbol = operand.at(offsets.resolve(*symbol));
            }
        });
        state
    }

    /// Tickets of this state, with `partials` of a workspace. A call has no more sequences than the
    /// state has slots.
    pub(crate) fn exchange(&self, partials: u64) -> InfiniExchange {
        let (head_tickets, sequence_tickets) = (self.head_tickets, self.sequence_tickets);
        InfiniExchange { partials, head_tickets, sequence_tickets }
    }
}

impl From<Counters> for InfiniCounters {
    fn from(c: Counters) -> Self {
        let rotated = u32::from(c.rotated);
        // N is at most 2^24.
        let open_len = c.open_len as u32;
        Self { tokens: c.tokens, committed: c.committed, open_len, rotated, ..Self::default() }
    }
}

impl From<InfiniCounters> for Counters {
    fn from(c: InfiniCounters) -> Self {
        let (open_len, rotated) = (c.open_len as usize, c.rotated != 0);
        Self { tokens: c.tokens, committed: c.committed, open_len, rotated }
    }
}
