//! Merging: local attentions over disjoint keys, and linear memories over disjoint tokens.

use rayon::prelude::*;

use crate::memory::Counters;
use crate::tensor::{Layout, Rows, RowsMut};
use crate::{Element, Error, Problem, Result, State, TensorView, TensorViewMut, Update};

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
    let a_dot_layouts: Vec<_> = a_dot.iter().map(TensorView::layout).collect();
    let lse_layouts: Vec<_> = lse.iter().map(TensorView::layout).collect();
    let out_lse_layout = out_lse.as_ref().map(TensorViewMut::layout);
    check_partials(&a_dot_layouts, &lse_layouts, &out.layout(), out_lse_layout.as_ref())?;
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
        out_lse.check_shape("out_lse", &lse_shape, "[B, Hq, T] or packed [Hq, total]")?;
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
    let counted: Vec<_> = states.iter().map(|s| (&s.problem, &s.counters[..])).collect();
    let counters = merge_counters(&counted)?;
    let Some(last) = states.last() else { return Err(no_states()) };
    let mut merged = State::clone(last);
    merged.counters = counters;
    add_up(&mut merged.m, states, |s| &s.m);
    add_up(&mut merged.z, states, |s| &s.z);
    Ok(merged)
}

fn no_states() -> Error {
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
    let slot_counters = |slot| states.iter().map(|(_, c)| c[slot]).collect::<Vec<_>>();
    (0..last.len()).map(|slot| merge_slot(problem, slot, &slot_counters(slot))).collect()
}

/// The counters of one slot of the merged states.
fn merge_slot(problem: &Problem, slot: usize, states: &[Counters]) -> Result<Counters> {
    let last = states.last().copied().unwrap_or_default();
    let mut merged = Counters { tokens: 0, committed: 0, ..last };
    let mut finished: Option<usize> = None;
    for (i, c) in states.iter().enumerate() {
        merged.tokens = merged.tokens.saturating_add(c.tokens);
        merged.committed = merged.committed.saturating_add(c.committed);
        if c.committed == 0 || problem.update() == Update::Linear {
            continue;
        }
        if let Some(first) = finished.replace(i) {
            return Err(Error::DeltaMerge {
                first,
                second: i,
                slot,
                first_tokens: states[first].committed,
                second_tokens: c.committed,
            });
        }
    }
    merged.check(problem, slot)?;
    Ok(merged)
}

/// The sum over all states, rounded once.
fn add_up(sum: &mut [f32], states: &[&State], part: impl Fn(&State) -> &[f32] + Sync) {
    sum.par_iter_mut().with_min_len(4096).enumerate().for_each(|(i, sum)| {
        *sum = states.iter().map(|s| f64::from(part(s)[i])).sum::<f64>() as f32;
    });
}
