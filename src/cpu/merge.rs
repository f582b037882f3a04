//! Merging: local attentions over disjoint keys, and linear memories over disjoint tokens.

use rayon::prelude::*;

use super::pool::{self, Pool};
use super::segment::SCRATCH;
use crate::alloc;
use crate::call::merge::{check_partials, merge_counters, no_states};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::State;
use crate::tensor::{Rows, RowsMut, TensorView, TensorViewMut};
use crate::trace::{Span, span};

/// Merges local attentions of the same queries over disjoint sets of keys into the attention over
/// all of them: out = Σ exp(lseᵢ − L) · A_dotᵢ with L = ln Σ exp(lseᵢ), which goes to `out_lse`.
///
/// `a_dot[i]` [B, T, Hq, Dv] and `lse[i]` [B, Hq, T] (packed: [total, Hq, Dv] and [Hq, total]) are
/// what [`crate::Outputs::a_dot`] and [`crate::Outputs::lse`] receive: the local branch before the
/// gate, and the *natural* log of Σ exp(scale · q·k). A part whose lse is −∞ attended nothing and
/// is skipped, whatever its row holds; a row that no part attends gives 0 and −∞. NaN propagates.
///
/// # Errors
/// [`crate::Error::Length`] when there is no part or not one `lse` per part,
/// [`crate::Error::Shape`] when `out` or `out_lse` has the wrong shape, [`crate::Error::Value`]
/// naming the entry when one of the parts does, [`crate::Error::Stride`] when a last dimension is
/// not contiguous, [`crate::Error::OutOfMemory`]. Nothing is written then.
pub fn merge_partials<T: Element>(
    a_dot: &[TensorView<'_, T>],
    lse: &[TensorView<'_, f32>],
    out: TensorViewMut<'_, T>,
    out_lse: Option<TensorViewMut<'_, f32>>,
) -> Result<()> {
    let span = span!("merge_partials", format_args!("{} parts, {:?}", a_dot.len(), out.shape()));
    span.run(|| merge_rows(&span, a_dot, lse, out, out_lse))
}

fn merge_rows<T: Element>(
    span: &Span,
    a_dot: &[TensorView<'_, T>],
    lse: &[TensorView<'_, f32>],
    mut out: TensorViewMut<'_, T>,
    mut out_lse: Option<TensorViewMut<'_, f32>>,
) -> Result<()> {
    let a_dot_layouts = alloc::collected(a_dot.iter().map(TensorView::layout), PARTS)?;
    let lse_layouts = alloc::collected(lse.iter().map(TensorView::layout), PARTS)?;
    let out_lse_layout = out_lse.as_ref().map(TensorViewMut::layout);
    check_partials(&a_dot_layouts, &lse_layouts, &out.layout(), out_lse_layout.as_ref())?;
    let (batch, tokens, heads) = match *out.shape() {
        [batch, tokens, heads, _] => (batch, tokens, heads),
        [tokens, heads, _] => (1, tokens, heads),
        _ => unreachable!("check_partials accepts ranks 3 and 4"),
    };
    if out.layout().is_empty() && out_lse_layout.is_none_or(|lse| lse.is_empty()) {
        return Ok(());
    }
    span.batch(batch, tokens);
    let rows: usize = out.shape()[..out.shape().len() - 2].iter().product();
    let width = out.shape()[out.shape().len() - 1];
    let parts = a_dot.iter().zip(lse).map(|(a, l)| (a.rows(), l.head_rows()));
    let parts = alloc::collected(parts, PARTS)?;
    pool::start()?;
    let scratch = Pool::new(rows, || Scratch::new(width, parts.len()))?;
    let out = out.rows();
    let out_lse = out_lse.as_mut().map(TensorViewMut::head_rows);
    (0..rows).into_par_iter().for_each(|row| {
        let (batch, token) = (row / tokens, row % tokens);
        scratch.with(|x| {
            for head in 0..heads {
                merge_row(&parts, [batch, token, head], &out, out_lse.as_ref(), x);
            }
        });
    });
    Ok(())
}

const PARTS: &str = "the list of parts";

/// Buffers of one running task.
struct Scratch {
    logs: Vec<f64>,
    part: Vec<f32>,
    sum: Vec<f32>,
}

impl Scratch {
    fn new(width: usize, parts: usize) -> Result<Self> {
        let row = || alloc::zeroed(&[width], SCRATCH);
        Ok(Self { logs: alloc::zeroed(&[parts], SCRATCH)?, part: row()?, sum: row()? })
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

/// Merges, slot by slot, states over disjoint runs of tokens into the state over all of them:
/// (M, z)_{A∪B} = (M, z)_A + (M, z)_B, and the counters add. The runs follow one another in the
/// order given, so only the last state may have open segments; the result continues them.
///
/// That is the linear rule. Under the delta rule a run's memory depends on everything before it:
/// of the states' memories of one slot at most one may be filled. Delta runs are computed apart and
/// joined as maps instead.
///
/// # Errors
/// [`crate::Error::Length`] without states or when their numbers of slots differ,
/// [`crate::Error::Problem`] when their problems differ, [`crate::Error::OpenSegment`],
/// [`crate::Error::DeltaMerge`], [`crate::Error::Value`] when the token counts overflow, and
/// [`crate::Error::OutOfMemory`].
pub fn merge_memories(states: &[&State]) -> Result<State> {
    let span = span!("merge_memories", format_args!("{} states", states.len()));
    span.run(|| sum_states(&span, states))
}

fn sum_states(span: &Span, states: &[&State]) -> Result<State> {
    let counted = states.iter().map(|s| (&s.problem, &s.counters[..]));
    let counted = alloc::collected(counted, "the list of states")?;
    let counters = merge_counters(&counted)?;
    let Some(last) = states.last() else { return Err(no_states()) };
    pool::start()?;
    let mut merged = last.try_clone()?;
    span.lens(counters.iter().map(|c| c.tokens as usize));
    merged.counters = counters;
    let (m, z) = merged.own_memory()?;
    add_up(m, states, |s| &s.m);
    add_up(z, states, |s| &s.z);
    Ok(merged)
}

/// The sum over all states, rounded once.
fn add_up(sum: &mut [f32], states: &[&State], part: impl Fn(&State) -> &[f32] + Sync) {
    sum.par_iter_mut().with_min_len(4096).enumerate().for_each(|(i, sum)| {
        *sum = states.iter().map(|s| f64::from(part(s)[i])).sum::<f64>() as f32;
    });
}
