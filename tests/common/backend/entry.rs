//! The entry points of the CUDA backend, whoever runs them.

use infini_attn::{Element, MAX_DECODE_TOKENS, Problem};

use crate::common::call::Call;
use crate::common::cases::Case;

/// By which operation calls are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Prefill,
    Segment,
    Decode,
    Forward,
    /// Each in turn, where it serves the call.
    Mixed,
}

impl Entry {
    /// Why a case is not run.
    pub fn refuses(self, case: &Case) -> Option<&'static str> {
        let beyond = self == Entry::Decode && case.largest_chunk() > MAX_DECODE_TOKENS;
        beyond.then_some("decode takes at most 16 new tokens per sequence")
    }

    /// What serves a call, by turns; `open_len`: tokens of a slot's open segment.
    pub fn of<T: Element>(
        self,
        p: &Problem,
        call: &Call<'_, T>,
        open_len: impl Fn(usize) -> usize,
        turn: u64,
    ) -> Self {
        if self != Entry::Mixed {
            return self;
        }
        let room = |slot: usize| p.segment_len() - open_len(slot);
        let segment = call.slots().into_iter().zip(&call.lens).all(|(s, n)| *n as usize <= room(s));
        let decode = call.longest() <= MAX_DECODE_TOKENS;
        match (decode, segment, turn % 3) {
            (true, _, 0) | (true, false, 1) => Entry::Decode,
            (_, true, 0 | 1) => Entry::Segment,
            _ => Entry::Forward,
        }
    }
}
