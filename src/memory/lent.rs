//! A state in memory that is not its own.

use std::sync::Arc;

use super::floats::Floats;
use super::layout::HostLayout;
use super::open::{Open, OpenSegments};
use super::{Counters, State};
use crate::alloc;
use crate::error::{Error, Result};
use crate::problem::Problem;

/// Counters as a [`HostLayout`] has them: tokens, committed, open_len, rotated.
pub(crate) type Stored = [i64; 4];

const COUNTERS: &str = "the counters of a state";

impl State {
    /// A state that works in place on memory in the form of `layout`, and the counters it began with,
    /// which it does not move. Copies of the state are in memory of their own.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Address`]; [`Error::Value`] for counters that no sequence of calls leads
    /// to.
    ///
    /// # Safety
    /// The memory must outlive the state, and nothing else may use it meanwhile but the counters returned.
    pub(crate) unsafe fn lent<'a>(
        layout: &HostLayout,
        memory: &'a mut [u8],
    ) -> Result<(State, &'a mut [Stored])> {
        // SAFETY: the caller's promise.
        let (mut state, stored) = unsafe { Self::lent_empty(layout, memory) }?;
        let counters = state.counters.iter_mut().zip(&*stored).enumerate();
        for (slot, (counters, stored)) in counters {
            let given = Counters::from_stored(*stored, &state.problem, layout.rotation(), slot)?;
            *counters = given;
        }
        let filled = state.counters.iter().map(|c| c.open_len);
        let filled = alloc::collected(filled, COUNTERS)?;
        let (_, open) = state.assembled();
        open.filled = filled;
        Ok((state, stored))
    }

    /// The same with the counters of empty streams, whatever those of the memory are.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Address`].
    ///
    /// # Safety
    /// As [`Self::lent`].
    pub(crate) unsafe fn lent_empty<'a>(
        layout: &HostLayout,
        memory: &'a mut [u8],
    ) -> Result<(State, &'a mut [Stored])> {
        let align = align_of::<Stored>();
        if memory.len() as u64 != layout.bytes() {
            let expected = format!("{} bytes", layout.bytes());
            return Err(Error::Length { argument: "state", got: memory.len(), expected });
        }
        let address = memory.as_ptr().addr();
        if !address.is_multiple_of(align) && !memory.is_empty() {
            let requirement = format!("a multiple of {align} expected");
            return Err(Error::Address {
                argument: "state".into(),
                got: address as u64,
                requirement,
            });
        }
        let mut parts = carve(layout, memory).into_iter();
        let mut next = || parts.next().unwrap_or_default();
        // SAFETY: the caller's promise.
        let mut floats = || unsafe { Floats::lent(elements(next())) };
        let (m, z, k) = (floats(), floats(), floats());
        let k_rotated = if layout.rotation() { floats() } else { Vec::new().into() };
        let v = floats();
        let stored: &mut [Stored] = elements(next());
        let counters = alloc::zeroed(&[stored.len()], COUNTERS)?;
        let filled = alloc::zeroed(&[stored.len()], COUNTERS)?;
        let open = Open::new(OpenSegments { k, k_rotated, v, filled });
        let problem = *layout.problem();
        Ok((State { problem, counters, m: Arc::new(m), z: Arc::new(z), open }, stored))
    }

    /// Moves the counters of the memory to where the state stands.
    pub(crate) fn store_counters(&self, stored: &mut [Stored]) {
        stored.iter_mut().zip(&self.counters).for_each(|(stored, c)| *stored = c.stored());
    }
}

impl Counters {
    /// The counters that memory holds.
    ///
    /// # Errors
    /// [`Error::Value`] for those that no sequence of calls leads to.
    pub(crate) fn from_stored(
        stored: Stored,
        problem: &Problem,
        rotation: bool,
        slot: usize,
    ) -> Result<Self> {
        let [tokens, committed, open_len, rotated] = stored;
        let count = |name: &str, n: i64| {
            u64::try_from(n).map_err(|_| Error::value(format!("{name}[{slot}]"), n, "at least 0"))
        };
        let counters = Self {
            tokens: count("tokens", tokens)?,
            committed: count("committed", committed)?,
            open_len: count("open_len", open_len)? as usize,
            rotated: rotated == 1,
        };
        counters.check(problem, slot)?;
        let most = i64::from(rotation || open_len == 0);
        if !(0..=most).contains(&rotated) {
            let expected = match most {
                0 => "0: the state has no room for rotated keys",
                _ => "0 or 1",
            };
            return Err(Error::value(format!("rotated[{slot}]"), rotated, expected));
        }
        Ok(counters)
    }

    /// The counts are below 2^63 ([`Self::check`]).
    pub(crate) fn stored(&self) -> Stored {
        let count = |n: u64| n as i64;
        [self.tokens, self.committed, self.open_len as u64, self.rotated.into()].map(count)
    }
}

/// A part as what it holds. One without elements lies anywhere.
fn elements<T: bytemuck::Pod>(part: &mut [u8]) -> &mut [T] {
    if part.is_empty() { &mut [] } else { bytemuck::cast_slice_mut(part) }
}

/// The parts of memory of the layout's length.
fn carve<'a>(layout: &HostLayout, memory: &'a mut [u8]) -> Vec<&'a mut [u8]> {
    let (mut rest, mut at) = (memory, 0);
    let parts = layout.parts().iter().map(|part| {
        let (_, tail) = std::mem::take(&mut rest).split_at_mut((part.offset - at) as usize);
        let (own, tail) = tail.split_at_mut(part.bytes() as usize);
        (rest, at) = (tail, part.offset + part.bytes());
        own
    });
    parts.collect()
}
