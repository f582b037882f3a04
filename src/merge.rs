//! Merging: local attentions over disjoint keys, and linear memories over disjoint tokens.

use rayon::prelude::*;

use crate::memory::Counters;
use crate::tensor::{Rows, RowsMut};
use crate::{Element, Error, Result, State, TensorView, TensorViewMut, Update};

/// Merges local attentions of the same queries over disjoint sets of keys into the attention over
/// all of them: out = Σ exp(lseᵢ − L) · A_dotᵢ with L = ln Σ exp(lseᵢ), which goes to `out_lse`.
///
/// `a_dot[i]` [B, T, Hq, Dv] and `lse[i]` [B, Hq, T] (packed: [total, Hq, Dv] and [Hq, total]) are
/// what [`crate::Outputs::a_dot`] and [`crate::Outputs::lse`] receive: the local branch before the
/// gate, and the *natural* log of Σ exp(scale · q·k). A part whose lse is −∞ attended nothing and
/// is skipped, whatever its row holds; a row that no part attends gives 0 and −∞. NaN propagates.
///
/// # Errors
/// [`Error::Length`] when there is no part or not one `lse` per part, [`Error::Shape`] when `out`
/// or `out_lse` has the wrong shape, [`Error::Value`] naming the entry when one of the parts does,
/// [`Error::Stride`] when a last dimension is not contiguous.
pub fn merge_partials<T: Element>(
    a_dot: &[TensorView<'_, T>],
    lse: &[TensorView<'_, f32>],
    mut out: TensorViewMut<'_, T>,
    mut out_lse: Option<TensorViewMut<'_, f32>>,
) -> Result<()> {
    check_partials(a_dot, lse, &out, out_lse.as_ref())?;
    let (tokens, heads) = match *out.shape() {
        [_, tokens, heads, _] => (tokens, heads),
        [tokens, heads, _] => (tokens, heads),
        _ => unreachable!("check_partials accepts ranks 3 and 4"),
    };
    let rows: usize = out.shape()[..out.shape().len() - 2].iter().product();
    let width = out.shape()[out.shape().len() - 1];
    let parts: Vec<_> = a_dot.iter().zip(lse).map(|(a, l)| (a.rows(), l.head_rows())).collect();
    let out = out.rows();
    let out_lse = out_lse.as_mut().map(TensorViewMut::head_rows);
    (0..rows).into_par_iter().for_each_init(
        || Scratch::new(width, parts.len()),
        |scratch, row| {
            let (batch, token) = (row / tokens, row % tokens);
            for head in 0..heads {
                merge_row(&parts, [batch, token, head], &out, out_lse.as_ref(), scratch);
            }
        },
    );
    Ok(())
}

/// Buffers of one thread.
struct Scratch {
    logs: Vec<f64>,
    part: Vec<f32>,
    sum: Vec<f32>,
}

impl Scratch {
    fn new(width: usize, parts: usize) -> Self {
        Self { logs: vec![0.0; parts], part: vec![0.0; width], sum: vec![0.0; width] }
    }
}

fn merge_row<T: Element>(
    parts: &[(Rows<'_, T>, Rows<'_, f32>)],
    [batch, token, head]: [usize; 3],
    out: &RowsMut<'_, T>,
    out_lse: Option<&RowsMut<'_, f32>>,
    scratch: &mut Scratch,
) {
    let Scratch { logs, part, sum } = scratch;
    for (log, (_, lse)) in logs.iter_mut().zip(parts) {
        // SAFETY: `check_partials` compared every shape; the caller stays inside them.
        *log = unsafe { lse.row(batch, 0, head) }[token].into();
    }
    let (max, exp_sum) = max_and_exp_sum(logs);
    sum.fill(0.0);
    for (&log, (a_dot, _)) in logs.iter().zip(parts).filter(|(log, _)| **log != f64::NEG_INFINITY) {
        // Not exp(log − lse): a large max would absorb the logarithm of the sum.
        let weight = ((log - max).exp() / exp_sum) as f32;
        // SAFETY: as above.
        T::widen(unsafe { a_dot.row(batch, token, head) }, part);
        sum.iter_mut().zip(&*part).for_each(|(s, p)| *s += weight * p);
    }
    // SAFETY: as above, and every row belongs to one call of this function.
    T::narrow(sum, unsafe { out.row(batch, token, head) });
    if let Some(out_lse) = out_lse {
        // SAFETY: as above, for every element.
        let lse = unsafe { out_lse.part([batch, 0, head], token..token + 1) };
        lse.fill((max + exp_sum.ln()) as f32);
    }
}

/// The largest log and Σ exp(log − max): (−∞, 1) when all are −∞, a NaN sum when one is NaN.
fn max_and_exp_sum(logs: &[f64]) -> (f64, f64) {
    if logs.iter().all(|&x| x == f64::NEG_INFINITY) {
        return (f64::NEG_INFINITY, 1.0);
    }
    let max = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (max, logs.iter().map(|x| (x - max).exp()).sum())
}

fn check_partials<T: Element>(
    a_dot: &[TensorView<'_, T>],
    lse: &[TensorView<'_, f32>],
    out: &TensorViewMut<'_, T>,
    out_lse: Option<&TensorViewMut<'_, f32>>,
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
        out_lse.layout().check_shape("out_lse", &lse_shape, "[B, Hq, T] or packed [Hq, total]")?;
        out_lse.check_rows("out_lse")?;
    }
    for (i, (a_dot, lse)) in a_dot.iter().zip(lse).enumerate() {
        check_entry("a_dot", i, a_dot, out.shape(), "the shape of out")?;
        check_entry("lse", i, lse, &lse_shape, "[B, Hq, T] or packed [Hq, total], as out")?;
    }
    Ok(())
}

/// One entry of a list of tensors: the error's argument says which.
fn check_entry<T>(
    list: &'static str,
    index: usize,
    view: &TensorView<'_, T>,
    expected: &[usize],
    names: &str,
) -> Result<()> {
    let argument = format!("{list}[{index}]");
    if view.shape() != expected {
        let got = format!("shape {:?}", view.shape());
        return Err(Error::value(argument, got, format!("{expected:?} ({names})")));
    }
    view.check_rows(list).map_err(|_| {
        let got = format!("strides {:?} (in elements)", view.strides());
        Error::value(argument, got, "a contiguous last dimension (stride 1)")
    })
}

/// Merges, slot by slot, states over disjoint runs of tokens into the state over all of them:
/// (M, z)_{A∪B} = (M, z)_A + (M, z)_B, and the counters add. The runs follow one another in the
/// order given, so only the last state may have open segments; the result continues them.
///
/// That is the linear rule. Under the delta rule a run's memory depends on everything before it:
/// of the states' memories of one slot at most one may be filled. Delta runs are computed apart and
/// joined as maps instead.
///
/// # Errors
/// [`Error::Length`] without states or when their numbers of slots differ, [`Error::Problem`] when
/// their problems differ, [`Error::OpenSegment`], [`Error::DeltaMerge`], and [`Error::Value`] when
/// the token counts overflow.
pub fn merge_memories(states: &[&State]) -> Result<State> {
    let Some((last, earlier)) = states.split_last() else {
        return Err(Error::Length { argument: "states", got: 0, expected: "at least 1".into() });
    };
    for (i, state) in states.iter().enumerate() {
        states[0].problem.check_same(&state.problem)?;
        if state.sequences() != states[0].sequences() {
            let got = format!("{} slots", state.sequences());
            let expected = format!("{} (those of states[0])", states[0].sequences());
            return Err(Error::value(format!("states[{i}]"), got, expected));
        }
    }
    for state in earlier {
        if let Some(slot) = state.counters.iter().position(|c| c.open_len > 0) {
            let open_len = state.counters[slot].open_len;
            return Err(Error::OpenSegment { argument: "states", slot, open_len });
        }
    }
    let counters = (0..last.sequences())
        .map(|slot| merge_counters(states, slot))
        .collect::<Result<Vec<_>>>()?;
    let mut merged = State::clone(last);
    merged.counters = counters;
    add_up(&mut merged.m, states, |s| &s.m);
    add_up(&mut merged.z, states, |s| &s.z);
    Ok(merged)
}

fn merge_counters(states: &[&State], slot: usize) -> Result<Counters> {
    let last = states[states.len() - 1];
    let mut merged = Counters { tokens: 0, committed: 0, ..last.counters[slot] };
    let mut finished: Option<usize> = None;
    for (i, state) in states.iter().enumerate() {
        let c = &state.counters[slot];
        merged.tokens = merged.tokens.saturating_add(c.tokens);
        merged.committed = merged.committed.saturating_add(c.committed);
        if c.committed == 0 || state.problem.update() == Update::Linear {
            continue;
        }
        if let Some(first) = finished.replace(i) {
            return Err(Error::DeltaMerge {
                first,
                second: i,
                slot,
                first_tokens: states[first].committed(slot),
                second_tokens: c.committed,
            });
        }
    }
    merged.check(&last.problem, slot)?;
    Ok(merged)
}

/// The sum over all states, rounded once.
fn add_up(sum: &mut [f32], states: &[&State], part: impl Fn(&State) -> &[f32] + Sync) {
    sum.par_iter_mut().with_min_len(4096).enumerate().for_each(|(i, sum)| {
        *sum = states.iter().map(|s| f64::from(part(s)[i])).sum::<f64>() as f32;
    });
}
