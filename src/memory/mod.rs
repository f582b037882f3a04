//! The state of a pool of sequences: compressive memory, normaliser, counters, open segment.

pub(crate) mod blocks;
mod io;
mod parts;

use blocks::KeyBlocks;

use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::tensor::TensorView;

/// Most tokens that a stream may have seen: positions stay inside i64.
const MAX_TOKENS: u64 = 1 << 62;

/// Tokens of a stream, a run or their sums after `added` more.
///
/// # Errors
/// [`Error::Value`] naming `argument` beyond [`MAX_TOKENS`].
pub(crate) fn add_tokens(argument: impl Into<String>, tokens: u64, added: u64) -> Result<u64> {
    tokens.checked_add(added).filter(|&sum| sum <= MAX_TOKENS).ok_or_else(|| {
        let expected = format!("at most {MAX_TOKENS} in all");
        Error::value(argument, format!("{added} tokens after {tokens}"), expected)
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

/// The state of `sequences` independent streams, one per slot: per KV head the memory M [Dk, Dv]
/// and the normaliser z `[Dk]`, both f32 always, the counters, and the keys and values of the open
/// segment (f32). Its size does not depend on how many tokens were seen.
///
/// ```
/// use infini_attn::{Problem, State};
/// let problem = Problem::builder().heads(8).kv_heads(2).head_dim(64).segment_len(256).build()?;
/// let state = State::new(&problem, 4);
/// assert_eq!(state.memory().shape(), [4, 2, 64, 64]);
/// assert_eq!((state.tokens(0), state.committed(0), state.open_len(0)), (0, 0, 0));
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct State {
    pub(crate) problem: Problem,
    pub(crate) counters: Vec<Counters>,
    /// M, [slots, Hkv, Dk, Dv].
    pub(crate) m: Vec<f32>,
    /// z, [slots, Hkv, Dk].
    pub(crate) z: Vec<f32>,
    pub(crate) open: OpenSegments,
}

/// Keys and values of the open segments, one chunk per (slot, KV head).
#[derive(Clone, Debug)]
pub(crate) struct OpenSegments {
    /// Unrotated keys, one [`KeyBlocks`] per (slot, KV head).
    pub k: Vec<f32>,
    /// Rotated keys, laid out alike; empty until a call brings rotation.
    pub k_rotated: Vec<f32>,
    /// Values, [slots, Hkv, N, Dv].
    pub v: Vec<f32>,
}

/// What belongs to one slot and KV head.
pub(crate) struct HeadMut<'a> {
    pub m: &'a mut [f32],
    pub z: &'a mut [f32],
    /// Open segment: unrotated keys.
    pub k: &'a mut [f32],
    /// Open segment: rotated keys, once any call has rotated.
    pub k_rotated: Option<&'a mut [f32]>,
    /// Open segment: values.
    pub v: &'a mut [f32],
}

/// The open segment of one slot and KV head.
#[derive(Clone, Copy)]
pub(crate) struct OpenRef<'a> {
    /// Unrotated keys, in [`KeyBlocks`] layout.
    pub k: &'a [f32],
    /// Rotated keys, once any call has rotated.
    pub k_rotated: Option<&'a [f32]>,
    /// Values, [N, Dv].
    pub v: &'a [f32],
}

impl OpenRef<'_> {
    /// The keys the local branch sees.
    pub fn local(&self, rotated: bool) -> &[f32] {
        if rotated { self.k_rotated.unwrap_or(self.k) } else { self.k }
    }
}

impl HeadMut<'_> {
    pub fn open(&self) -> OpenRef<'_> {
        OpenRef { k: self.k, k_rotated: self.k_rotated.as_deref(), v: self.v }
    }
}

impl State {
    /// Empty streams in slots 0 to `sequences` − 1.
    pub fn new(problem: &Problem, sequences: usize) -> Self {
        let chunks = sequences * problem.kv_heads();
        let (dk, dv, n) = (problem.key_dim(), problem.value_dim(), problem.segment_len());
        Self {
            problem: *problem,
            counters: vec![Counters::default(); sequences],
            m: vec![0.0; chunks * dk * dv],
            z: vec![0.0; chunks * dk],
            open: OpenSegments {
                k: vec![0.0; chunks * KeyBlocks::new(problem).len()],
                k_rotated: Vec::new(),
                v: vec![0.0; chunks * n * dv],
            },
        }
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

    /// Bytes held, open segments included.
    pub fn bytes(&self) -> usize {
        let floats = [&self.m, &self.z, &self.open.k, &self.open.k_rotated, &self.open.v];
        floats.iter().map(|v| 4 * v.len()).sum::<usize>()
            + self.counters.len() * size_of::<Counters>()
    }

    /// Forgets everything the given slots have seen.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range or named twice; nothing is reset then.
    pub fn reset(&mut self, slots: &[usize]) -> Result<()> {
        check_slots(slots, self.sequences())?;
        for &slot in slots {
            let (m, z) = (self.m.len() / self.sequences(), self.z.len() / self.sequences());
            self.m[slot * m..][..m].fill(0.0);
            self.z[slot * z..][..z].fill(0.0);
            self.counters[slot] = Counters::default();
        }
        Ok(())
    }

    /// A new state whose slot i continues where `slots[i]` stands now. A slot may be named several
    /// times (sampling several continuations of one prompt).
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range.
    pub fn fork(&self, slots: &[usize]) -> Result<State> {
        for (i, &slot) in slots.iter().enumerate() {
            check_slots(&[slot], self.sequences()).map_err(|_| {
                let expected = format!("less than the state's {} slots", self.sequences());
                Error::value(format!("slots[{i}]"), slot, expected)
            })?;
        }
        let pick = |all: &[f32]| -> Vec<f32> {
            let chunk = all.len() / self.sequences().max(1);
            slots.iter().flat_map(|&s| &all[s * chunk..][..chunk]).copied().collect()
        };
        Ok(State {
            problem: self.problem,
            counters: slots.iter().map(|&s| self.counters[s]).collect(),
            m: pick(&self.m),
            z: pick(&self.z),
            open: OpenSegments {
                k: pick(&self.open.k),
                k_rotated: pick(&self.open.k_rotated),
                v: pick(&self.open.v),
            },
        })
    }

    /// Mutable parts of every (slot, KV head), in order; callers take what they work on.
    pub(crate) fn heads_mut(&mut self) -> Vec<Option<HeadMut<'_>>> {
        let p = &self.problem;
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let blocks = KeyBlocks::new(p).len();
        let mut rotated = self.open.k_rotated.chunks_exact_mut(blocks);
        (self.m.chunks_exact_mut(dk * dv))
            .zip(self.z.chunks_exact_mut(dk))
            .zip(self.open.k.chunks_exact_mut(blocks))
            .zip(self.open.v.chunks_exact_mut(p.segment_len() * dv))
            .map(|(((m, z), k), v)| Some(HeadMut { m, z, k, k_rotated: rotated.next(), v }))
            .collect()
    }

    /// Open segment of one (slot, KV head).
    pub(crate) fn open(&self, slot: usize, kv_head: usize) -> OpenRef<'_> {
        let p = &self.problem;
        let at = slot * p.kv_heads() + kv_head;
        let (blocks, values) = (KeyBlocks::new(p).len(), p.segment_len() * p.value_dim());
        OpenRef {
            k: &self.open.k[at * blocks..][..blocks],
            k_rotated: self.open.k_rotated.chunks_exact(blocks).nth(at),
            v: &self.open.v[at * values..][..values],
        }
    }

    /// Room for rotated keys, made by the first call that rotates.
    pub(crate) fn ensure_rotated(&mut self) {
        if self.open.k_rotated.is_empty() {
            self.open.k_rotated = vec![0.0; self.open.k.len()];
        }
    }
}

/// Slots must lie inside the state and be distinct.
pub(crate) fn check_slots(slots: &[usize], available: usize) -> Result<()> {
    let mut taken = vec![None; available];
    for (i, &slot) in slots.iter().enumerate() {
        match taken.get_mut(slot) {
            None => {
                let expected = format!("less than the state's {available} slots");
                return Err(Error::value(format!("slots[{i}]"), slot, expected));
            }
            Some(Some(first)) => {
                let expected = format!("a slot other than slots[{first}]");
                return Err(Error::value(format!("slots[{i}]"), slot, expected));
            }
            Some(free) => *free = Some(i),
        }
    }
    Ok(())
}
