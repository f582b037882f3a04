//! A state put together from parts that come from outside: the caller's arrays, or a file.

use std::sync::Arc;

use super::open::{Open, OpenSegments};
use super::{Counters, MAX_TOKENS, State, too_large};
use crate::alloc;
use crate::error::{Error, Result};
use crate::problem::Problem;

impl Counters {
    /// Refuses counters that no sequence of calls leads to.
    pub(crate) fn check(&self, problem: &Problem, slot: usize) -> Result<()> {
        let refuse = |name: &str, got: u64, expected: String| {
            Err(Error::value(format!("{name}[{slot}]"), got, expected))
        };
        if self.tokens > MAX_TOKENS {
            return refuse("tokens", self.tokens, format!("at most {MAX_TOKENS}"));
        }
        if self.committed > self.tokens {
            let expected = format!("at most tokens[{slot}] = {}", self.tokens);
            return refuse("committed", self.committed, expected);
        }
        if self.open_len >= problem.segment_len() {
            let expected = format!("less than segment_len = {}", problem.segment_len());
            return refuse("open_len", self.open_len as u64, expected);
        }
        let room = self.tokens - self.committed;
        if self.open_len as u64 > room {
            let expected = format!("at most tokens[{slot}] − committed[{slot}] = {room}");
            return refuse("open_len", self.open_len as u64, expected);
        }
        Ok(())
    }
}

impl State {
    /// A state that continues from given memories, without open segments: slot i has seen
    /// `tokens[i]` tokens, of which `committed[i]` are in its memory.
    ///
    /// `memory` is M, row-major [S, Hkv, Dk, Dv]; `normalizer` is z, [S, Hkv, Dk]; the state gets
    /// S = `tokens.len()` slots. Their values are taken as they are, NaN included.
    ///
    /// ```
    /// use infini_attn::{Problem, State};
    /// let problem = Problem::builder().heads(2).head_dim(4).segment_len(8).build()?;
    /// let (memory, normalizer) = ([0.5; 2 * 4 * 4], [1.0; 2 * 4]);
    /// let state = State::from_parts(&problem, &memory, &normalizer, &[24], &[24])?;
    /// assert_eq!((state.tokens(0), state.open_len(0)), (24, 0));
    /// # Ok::<(), infini_attn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Length`] when a list has the wrong length. [`Error::Value`] when `committed[i]`
    /// exceeds `tokens[i]`, or when it is 0 but slot i of `memory` or `normalizer` is not (nothing
    /// would ever read it). [`Error::OutOfMemory`].
    pub fn from_parts(
        problem: &Problem,
        memory: &[f32],
        normalizer: &[f32],
        tokens: &[u64],
        committed: &[u64],
    ) -> Result<State> {
        if committed.len() != tokens.len() {
            let expected = format!("{} (the length of tokens)", tokens.len());
            return Err(Error::Length { argument: "committed", got: committed.len(), expected });
        }
        let (s, h, dk) = (tokens.len(), problem.kv_heads(), problem.key_dim());
        check_len("memory", memory, &[s, h, dk, problem.value_dim()], "[S, Hkv, Dk, Dv]")?;
        check_len("normalizer", normalizer, &[s, h, dk], "[S, Hkv, Dk]")?;
        let counters = (tokens.iter().zip(committed)).map(|(&tokens, &committed)| Counters {
            tokens,
            committed,
            ..Counters::default()
        });
        let counters = alloc::collected(counters, "the counters of a state")?;
        let m = alloc::copied(memory, "the memory of a state")?;
        let z = alloc::copied(normalizer, "the normaliser of a state")?;
        Self::assemble(problem, m, z, counters)
    }

    /// A state from its parts, `m` and `z` of the right length; open segments get room and their
    /// counters, their rows are left to the caller.
    pub(crate) fn assemble(
        problem: &Problem,
        m: Vec<f32>,
        z: Vec<f32>,
        counters: Vec<Counters>,
    ) -> Result<State> {
        let (m_len, z_len) = (m.len() / counters.len().max(1), z.len() / counters.len().max(1));
        for (slot, c) in counters.iter().enumerate() {
            c.check(problem, slot)?;
            let filled = |all: &[f32], len| all[slot * len..][..len].iter().any(|&x| x != 0.0);
            if c.committed == 0 && (filled(&m, m_len) || filled(&z, z_len)) {
                let expected = "at least 1: this slot's memory is not zero";
                return Err(Error::value(format!("committed[{slot}]"), 0, expected));
            }
        }
        let rotated = counters.iter().any(|c| c.open_len > 0 && c.rotated);
        let mut open = OpenSegments::new(problem, counters.len(), rotated)
            .map_err(|_| too_large(problem, counters.len(), rotated))?;
        open.filled.iter_mut().zip(&counters).for_each(|(filled, c)| *filled = c.open_len);
        let (m, z, open) = (Arc::new(m.into()), Arc::new(z.into()), Open::new(open));
        Ok(State { problem: *problem, counters, m, z, open })
    }
}

/// A list must have as many numbers as the shape says.
pub(crate) fn check_len(
    argument: &'static str,
    got: &[f32],
    shape: &[usize],
    names: &str,
) -> Result<()> {
    let expected = shape.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
    if expected != Some(got.len()) {
        let expected = format!("the product of {names} = {shape:?}");
        return Err(Error::Length { argument, got: got.len(), expected });
    }
    Ok(())
}
