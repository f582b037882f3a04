//! What may be merged: the checks that all backends share.

use crate::alloc;
use crate::error::{Error, Result};
use crate::memory::Counters;
use crate::problem::{Problem, Update};
use crate::tensor::Layout;

/// The shapes of a merge of partial attentions.
pub(crate) fn check_partials(
    a_dot: &[Layout],
    lse: &[Layout],
    out: &Layout,
    out_lse: Option<&Layout>,
) -> Result<()> {
    if a_dot.is_empty() {
        return Err(Error::Length { argument: "a_dot", got: 0, expected: "at least 1".into() });
    }
    if lse.len() != a_dot.len() {
        let expected = format!("{} (one per entry of a_dot)", a_dot.len());
        return Err(Error::Length { argument: "lse", got: lse.len(), expected });
    }
    let lse_shape = match *out.shape() {
        [batch, tokens, heads, _] => vec![batch, heads, tokens],
        [tokens, heads, _] => vec![heads, tokens],
        _ => {
            let expected = "[B, T, Hq, Dv] or packed [total, Hq, Dv]";
            return Err(Error::shape("out", out.shape(), expected));
        }
    };
    out.check_rows("out")?;
    if let Some(out_lse) = out_lse {
        out_lse.check_shape("out_lse", &[&lse_shape], "[B, Hq, T] or packed [Hq, total]")?;
        out_lse.check_rows("out_lse")?;
    }
    for (i, (a_dot, lse)) in a_dot.iter().zip(lse).enumerate() {
        check_entry("a_dot", i, a_dot, out.shape(), "the shape of out")?;
        check_entry("lse", i, lse, &lse_shape, "[B, Hq, T] or packed [Hq, total], as out")?;
    }
    Ok(())
}

/// One entry of a list of tensors: the error's argument says which.
fn check_entry(
    list: &'static str,
    index: usize,
    layout: &Layout,
    expected: &[usize],
    names: &str,
) -> Result<()> {
    let argument = format!("{list}[{index}]");
    if layout.shape() != expected {
        let got = format!("shape {:?}", layout.shape());
        return Err(Error::value(argument, got, format!("{expected:?} ({names})")));
    }
    layout.check_rows(list).map_err(|_| {
        let got = format!("strides {:?} (in elements)", layout.strides());
        Error::value(argument, got, "a contiguous last dimension (stride 1)")
    })
}

/// A merge of nothing.
pub(crate) fn no_states() -> Error {
    Error::Length { argument: "states", got: 0, expected: "at least 1".into() }
}

/// Checks that states may be merged, whatever holds their memories, and adds up their counters.
pub(crate) fn merge_counters(states: &[(&Problem, &[Counters])]) -> Result<Vec<Counters>> {
    let Some(((problem, last), earlier)) = states.split_last() else { return Err(no_states()) };
    for (i, (other, counters)) in states.iter().enumerate() {
        states[0].0.check_same(other)?;
        if counters.len() != states[0].1.len() {
            let got = format!("{} slots", counters.len());
            let expected = format!("{} (those of states[0])", states[0].1.len());
            return Err(Error::value(format!("states[{i}]"), got, expected));
        }
    }
    for (_, counters) in earlier {
        if let Some(slot) = counters.iter().position(|c| c.open_len > 0) {
            let open_len = counters[slot].open_len;
            return Err(Error::OpenSegment { argument: "states", slot, open_len });
        }
    }
    let mut merged = alloc::reserved(&[last.len()], "the counters of a state")?;
    for (slot, last) in last.iter().enumerate() {
        merged.push(merge_slot(problem, slot, *last, states.iter().map(|(_, c)| c[slot]))?);
    }
    Ok(merged)
}

/// The counters of one slot of the merged states, the last of which may have an open segment.
fn merge_slot(
    problem: &Problem,
    slot: usize,
    last: Counters,
    states: impl Iterator<Item = Counters>,
) -> Result<Counters> {
    let mut merged = Counters { tokens: 0, committed: 0, ..last };
    let mut finished: Option<(usize, u64)> = None;
    for (i, c) in states.enumerate() {
        merged.tokens = merged.tokens.saturating_add(c.tokens);
        merged.committed = merged.committed.saturating_add(c.committed);
        if c.committed == 0 || problem.update() == Update::Linear {
            continue;
        }
        if let Some((first, first_tokens)) = finished.replace((i, c.committed)) {
            return Err(Error::DeltaMerge {
                first,
                second: i,
                slot,
                first_tokens,
                second_tokens: c.committed,
            });
        }
    }
    merged.check(problem, slot)?;
    Ok(merged)
}
