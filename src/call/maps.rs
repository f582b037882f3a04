//! Runs of tokens that are summed up or made into maps, and which may follow which: the checks that
//! all backends share.

use super::check::dtype_is;
use crate::alloc;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::{Counters, add_tokens};
use crate::problem::Problem;
use crate::tensor::Layout;

/// Sums or maps must have one entry per sequence.
pub(crate) fn check_batch(argument: &'static str, got: usize, expected: usize) -> Result<()> {
    if got != expected {
        let expected = format!("{expected} (sequences)");
        return Err(Error::Length { argument, got, expected });
    }
    Ok(())
}

/// Tokens of runs whose sums are given from outside: no more than a stream may see, and some where the
/// sums are not zero.
pub(crate) fn check_summed(tokens: &[u64], sums: &[f32]) -> Result<()> {
    let len = sums.len() / tokens.len().max(1);
    for (b, &n) in tokens.iter().enumerate() {
        add_tokens(format_args!("tokens[{b}]"), 0, n)?;
        if n == 0 && sums[b * len..][..len].iter().any(|&x| x != 0.0) {
            let expected = "at least 1: the sums of this sequence are not zero";
            return Err(Error::value(format!("tokens[{b}]"), 0, expected));
        }
    }
    Ok(())
}

/// Tokens of two runs, sequence by sequence.
pub(crate) fn sum_tokens(argument: &str, first: &[u64], second: &[u64]) -> Result<Vec<u64>> {
    let mut sums = alloc::copied(first, "the tokens of a run")?;
    for (b, (sum, &second)) in sums.iter_mut().zip(second).enumerate() {
        *sum = add_tokens(format_args!("{argument} (sequence {b})"), *sum, second)?;
    }
    Ok(sums)
}

/// Checks the keys [B, T, Hkv, Dk] of runs of tokens and returns (B, T).
pub(crate) fn check_keys(problem: &Problem, dtype: DType, k: &Layout) -> Result<(usize, usize)> {
    check_tokens(problem, "k", dtype, k, problem.key_dim())
}

/// Checks the arguments of a map: keys [B, T, Hkv, Dk], values [B, T, Hkv, Dv], and the tokens of
/// what the runs find. Returns (B, T).
pub(crate) fn check_map(
    problem: &Problem,
    k: (DType, &Layout),
    v: (DType, &Layout),
    before: (&Problem, &[u64]),
) -> Result<(usize, usize)> {
    let (batch, tokens) = check_keys(problem, k.0, k.1)?;
    let got = check_tokens(problem, "v", v.0, v.1, problem.value_dim())?;
    if got != (batch, tokens) {
        let expected = format!("B = {batch}, T = {tokens} as k");
        return Err(Error::shape("v", v.1.shape(), expected));
    }
    problem.check_same(before.0)?;
    check_batch("before", before.1.len(), batch)?;
    for (b, &before) in before.1.iter().enumerate() {
        add_tokens(format_args!("k (sequence {b})"), before, tokens as u64)?;
    }
    Ok((batch, tokens))
}

fn check_tokens(
    problem: &Problem,
    argument: &'static str,
    dtype: DType,
    x: &Layout,
    dim: usize,
) -> Result<(usize, usize)> {
    dtype_is(argument, dtype, problem.dtype())?;
    let &[b, t, heads, d] = x.shape() else {
        return Err(Error::shape(argument, x.shape(), "rank 4 [B, T, Hkv, D]"));
    };
    if [heads, d] != [problem.kv_heads(), dim] {
        let expected = format!("[B, T, Hkv = {}, {dim}]", problem.kv_heads());
        return Err(Error::shape(argument, x.shape(), expected));
    }
    x.check_rows(argument)?;
    Ok((b, t))
}

/// What a map was made for, per sequence: earlier tokens, and its own.
#[derive(Clone, Copy)]
pub(crate) struct MapTokens<'a> {
    pub problem: &'a Problem,
    pub before: &'a [u64],
    pub tokens: &'a [u64],
}

impl MapTokens<'_> {
    /// `second` must have been made for the tokens that this map leaves behind.
    pub fn check_followed_by(&self, second: &MapTokens<'_>) -> Result<()> {
        self.problem.check_same(second.problem)?;
        check_batch("second", second.tokens.len(), self.tokens.len())?;
        let after = sum_tokens("first", self.before, self.tokens)?;
        check_follows("second", after, second.before)
    }

    /// A state must have no open segment and have committed what this map was made for; its counters
    /// after the map.
    pub fn apply(&self, problem: &Problem, counters: &[Counters]) -> Result<Vec<Counters>> {
        self.problem.check_same(problem)?;
        check_batch("state", counters.len(), self.tokens.len())?;
        for (slot, c) in counters.iter().enumerate() {
            if c.open_len > 0 {
                return Err(Error::OpenSegment { argument: "state", slot, open_len: c.open_len });
            }
        }
        check_follows("map", counters.iter().map(|c| c.committed), self.before)?;
        let mut after = alloc::copied(counters, "the counters of a state")?;
        for (b, (c, &tokens)) in after.iter_mut().zip(self.tokens).enumerate() {
            let argument = format_args!("map (sequence {b})");
            c.tokens = add_tokens(argument, c.tokens, tokens)?;
            c.committed = add_tokens(argument, c.committed, tokens)?;
        }
        Ok(after)
    }
}

/// A map may only follow the number of tokens it was made for.
fn check_follows(
    argument: &'static str,
    found: impl IntoIterator<Item = u64>,
    made_for: &[u64],
) -> Result<()> {
    for (b, (found, made_for)) in found.into_iter().zip(made_for).enumerate() {
        if found != *made_for {
            return Err(Error::value(
                format!("{argument} (sequence {b})"),
                format!("a map made for {made_for} earlier tokens"),
                format!("one made for {found}"),
            ));
        }
    }
    Ok(())
}
