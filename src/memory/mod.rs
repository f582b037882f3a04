//! The state of a pool of sequences: compressive memory, normaliser, counters, open segment.

pub(crate) mod blocks;
mod copies;
mod floats;
pub(crate) mod gradient;
pub(crate) mod heads;
pub(crate) mod io;
pub(crate) mod layout;
pub(crate) mod lent;
pub(crate) mod open;
pub(crate) mod parts;
pub(crate) mod slots;

use std::fmt::Display;
use std::sync::Arc;

use blocks::KeyBlocks;
use floats::Floats;
use open::{Open, OpenSegments};

use crate::alloc;
use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::tensor::TensorView;

/// Most tokens that a stream may have seen: positions stay inside i64.
const MAX_TOKENS: u64 = 1 << 62;

/// Tokens of a stream, a run or their sums after `added` more.
///
/// # Errors
/// [`Error::Value`] naming `argument` beyond [`MAX_TOKENS`].
pub(crate) fn add_tokens(argument: impl Display, tokens: u64, added: u64) -> Result<u64> {
    tokens.checked_add(added).filter(|&sum| sum <= MAX_TOKENS).ok_or_else(|| {
        let expected = format!("at most {MAX_TOKENS} in all");
        Error::value(argument.to_string(), format!("{added} tokens after {tokens}"), expected)
    })
}

/// Counters of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// All tokens seen; the next token's default position.
    pub tokens: u64,
    /// Tokens written into (M, z).
    pub committed: u64,
    /// Tokens in the open segment, 0 to N − 1.
    pub open_len: usize,
    /// Whether the open segment's tokens came with rotation. Meaningful while `open_len > 0`.
    pub rotated: bool,
}

// SAFETY: zeros are the default.
unsafe impl bytemuck::Zeroable for Counters {}

/// The state of `sequences` independent streams, one per slot: per KV head the memory M [Dk, Dv]
/// and the normaliser z `[Dk]`, both f32 always, the counters, and the keys and values of the open
/// segment (f32). Its size does not depend on how many tokens were seen.
///
/// ```
/// use infini_attn::{Problem, State};
/// let problem = Problem::builder().heads(8).kv_heads(2).head_dim(64).segment_len(256).build()?;
/// let state = State::new(&problem, 4)?;
/// assert_eq!(state.memory().shape(), [4, 2, 64, 64]);
/// assert_eq!((state.tokens(0), state.committed(0), state.open_len(0)), (0, 0, 0));
/// # Ok::<(), infini_attn::Error>(())
/// ```
///
/// A copy takes next to nothing: it shares its buffers with the state, and whichever of the two is
/// written to first takes a copy of what that touches. Decoding appends without one.
#[derive(Debug)]
pub struct State {
    pub(crate) problem: Problem,
    pub(crate) counters: Vec<Counters>,
    /// M, [slots, Hkv, Dk, Dv].
    pub(crate) m: Arc<Floats>,
    /// z, [slots, Hkv, Dk].
    pub(crate) z: Arc<Floats>,
    pub(crate) open: Open,
}

impl State {
    /// Empty streams in slots 0 to `sequences` − 1. [`Problem::state_bytes`] says beforehand how much
    /// that takes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(problem: &Problem, sequences: usize) -> Result<Self> {
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        let make = || -> Result<Self> {
            Ok(Self {
                problem: *problem,
                counters: alloc::zeroed(&[sequences], "")?,
                m: Arc::new(alloc::zeroed(&[sequences, h, dk, dv], "")?.into()),
                z: Arc::new(alloc::zeroed(&[sequences, h, dk], "")?.into()),
                open: Open::new(OpenSegments::new(problem, sequences, false)?),
            })
        };
        make().map_err(|_| too_large(problem, sequences, false))
    }

    /// The problem this state belongs to.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Number of slots.
    pub fn sequences(&self) -> usize {
        self.counters.len()
    }

    /// M, f32 [slots, Hkv, Dk, Dv].
    pub fn memory(&self) -> TensorView<'_, f32> {
        let p = &self.problem;
        let shape = [self.sequences(), p.kv_heads(), p.key_dim(), p.value_dim()];
        TensorView::new(&self.m, &shape).expect("m has this shape since State::new")
    }

    /// z, f32 [slots, Hkv, Dk].
    pub fn normalizer(&self) -> TensorView<'_, f32> {
        let p = &self.problem;
        let shape = [self.sequences(), p.kv_heads(), p.key_dim()];
        TensorView::new(&self.z, &shape).expect("z has this shape since State::new")
    }

    /// Tokens the slot has seen; also the default position of its next token.
    ///
    /// # Panics
    /// This and the two accessors below panic when `slot` is not less than [`Self::sequences`].
    pub fn tokens(&self, slot: usize) -> u64 {
        self.counters[slot].tokens
    }

    /// Tokens the slot has written into (M, z).
    pub fn committed(&self, slot: usize) -> u64 {
        self.counters[slot].committed
    }

    /// Tokens in the slot's open segment, 0 to N − 1.
    pub fn open_len(&self, slot: usize) -> usize {
        self.counters[slot].open_len
    }

    /// Bytes held, open segments included, whether or not copies of the state share them.
    pub fn bytes(&self) -> usize {
        let open = self.open.read();
        let floats: [&[f32]; 5] = [&self.m, &self.z, &open.k, &open.k_rotated, &open.v];
        floats.iter().map(|v| 4 * v.len()).sum::<usize>()
            + self.counters.len() * size_of::<Counters>()
    }

    /// Forgets everything the given slots have seen.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range or named twice, [`Error::OutOfMemory`]; nothing is
    /// reset then.
    pub fn reset(&mut self, slots: &[usize]) -> Result<()> {
        check_slots(slots, self.sequences())?;
        let sequences = self.sequences();
        let (m, z) = self.own_memory()?;
        for &slot in slots {
            for all in [&mut **m, &mut **z] {
                let len = all.len() / sequences;
                all[slot * len..][..len].fill(0.0);
            }
        }
        slots.iter().for_each(|&slot| self.counters[slot] = Counters::default());
        self.note_filled(slots.iter().copied());
        Ok(())
    }
}

impl Problem {
    /// Bytes of a [`State`] of so many slots on the host, as [`State::bytes`] counts them, before
    /// anything is allocated; `rotation`: with the rotated keys that calls with [`Rope`](crate::Rope)
    /// add to it. On a device it is `cuda::StateLayout::new(problem, slots, rotation)?.bytes()`.
    ///
    /// ```
    /// # use infini_attn::{Problem, State};
    /// let problem = Problem::builder().heads(8).head_dim(64).segment_len(256).build()?;
    /// assert_eq!(problem.state_bytes(4, false)?, State::new(&problem, 4)?.bytes() as u64);
    /// # Ok::<(), infini_attn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for more bytes than 64 bits count.
    pub fn state_bytes(&self, sequences: usize, rotation: bool) -> Result<u64> {
        u64::try_from(state_bytes(self, sequences, rotation))
            .map_err(|_| too_large(self, sequences, rotation))
    }
}

fn state_bytes(p: &Problem, sequences: usize, rotation: bool) -> u128 {
    let keys = KeyBlocks::new(p).len() * if rotation { 2 } else { 1 };
    let (dk, dv) = (p.key_dim(), p.value_dim());
    // At most 2^41 (`Problem::build`); counted in 128 bits because of the slots.
    let floats = p.kv_heads() * (dk * dv + dk + keys + p.segment_len() * dv);
    sequences as u128 * (size_of::<f32>() * floats + size_of::<Counters>()) as u128
}

/// The error of a state that memory does not hold.
fn too_large(problem: &Problem, sequences: usize, rotation: bool) -> Error {
    let bytes = state_bytes(problem, sequences, rotation);
    Error::out_of_memory(format_args!("a state of {sequences} slots"), bytes)
}

/// Slots must lie inside the state and be distinct.
pub(crate) fn check_slots(slots: &[usize], available: usize) -> Result<()> {
    check_slots_by(slots, available, &mut Named::new())
}

/// Slots in order, each with its place in the list that names them.
pub(crate) type Named = Vec<(usize, usize)>;

/// The same by a table of an earlier call.
pub(crate) fn check_slots_by(slots: &[usize], available: usize, named: &mut Named) -> Result<()> {
    (0..slots.len()).try_for_each(|i| check_slot(slots, i, available))?;
    let places = (0..slots.len()).map(|i| (slots[i], i));
    alloc::refill(named, places, "the table of named slots")?;
    named.sort_unstable();
    let again = named.windows(2).filter(|pair| pair[0].0 == pair[1].0);
    match again.min_by_key(|pair| pair[1].1) {
        Some(&[(slot, first), (_, i)]) => {
            let expected = format!("a slot other than slots[{first}]");
            Err(Error::value(format!("slots[{i}]"), slot, expected))
        }
        _ => Ok(()),
    }
}

fn check_slot(slots: &[usize], i: usize, available: usize) -> Result<()> {
    if slots[i] >= available {
        let expected = format!("less than the state's {available} slots");
        return Err(Error::value(format!("slots[{i}]"), slots[i], expected));
    }
    Ok(())
}
