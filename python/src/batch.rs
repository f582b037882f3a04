//! Which tokens of a call's tensors belong to which stream, and which slot of the state each takes.

use std::ops::Range;

use infini_attn::Inputs;
use pyo3::prelude::*;

use crate::{error, tensor};

/// The arguments that say so, as given; of the first three at most one.
#[derive(Clone, Copy)]
pub struct Given<'a, 'py> {
    pub seq_lens: Option<&'a Bound<'py, PyAny>>,
    pub attention_mask: Option<&'a Bound<'py, PyAny>>,
    pub cu_seqlens: Option<&'a Bound<'py, PyAny>>,
    pub slots: Option<&'a Bound<'py, PyAny>>,
}

/// How long sequences are and where they lie, as the core takes it.
enum Lengths {
    Full,
    Padded(Vec<i32>),
    Ranges(Vec<Range<i32>>),
    Packed(Vec<i32>),
}

/// A call of any backend, with a batch.
macro_rules! laid_out {
    ($batch:expr, $call:expr) => {{
        let call = match &$batch.lengths {
            Lengths::Full => $call,
            Lengths::Padded(lens) => $call.seq_lens(lens),
            Lengths::Ranges(ranges) => $call.seq_ranges(ranges),
            Lengths::Packed(cu) => $call.cu_seqlens(cu),
        };
        match &$batch.slots {
            Some(slots) => call.slots(slots),
            None => call,
        }
    }};
}

/// The batch of one call. What is not of its rank has been refused; the rest is for the core to check.
pub struct Batch {
    /// [B, T], or [total] when packed.
    lead: Vec<usize>,
    lengths: Lengths,
    slots: Option<Vec<usize>>,
}

impl Batch {
    /// `q`: the shape of the queries.
    pub fn new(q: &[usize], given: Given<'_, '_>) -> PyResult<Self> {
        let named = [
            ("seq_lens", given.seq_lens),
            ("attention_mask", given.attention_mask),
            ("cu_seqlens", given.cu_seqlens),
        ];
        let mut named = named.into_iter().filter_map(|(name, object)| Some((name, object?)));
        let lengths = named.next();
        if let (Some((first, _)), Some((second, _))) = (lengths, named.next()) {
            return Err(error::value(second, format_args!("beside {first}"), "one of the two"));
        }
        let lead = match given.cu_seqlens {
            Some(_) => lead::<3>(q, "[total, Hq, Dk], as cu_seqlens is given")?,
            None => lead::<4>(q, "[B, T, Hq, Dk]")?,
        };
        let lengths = match lengths {
            None => Lengths::Full,
            Some((name @ "seq_lens", lens)) => Lengths::Padded(list(name, lens, "[B]", "0 to T")?),
            Some((name @ "cu_seqlens", cu)) => {
                Lengths::Packed(list(name, cu, "[B + 1]", "0 to total")?)
            }
            Some((_, mask)) => Lengths::Ranges(ranges(mask, [lead[0], lead[1]])?),
        };
        let slots =
            given.slots.map(|slots| list("slots", slots, "[B]", "at least 0")).transpose()?;
        Ok(Self { lead, lengths, slots })
    }

    pub fn packed(&self) -> bool {
        matches!(self.lengths, Lengths::Packed(_))
    }

    /// [B, T], or [total] when packed.
    pub fn lead(&self) -> &[usize] {
        &self.lead
    }

    /// B and T; packed: 1 and all tokens.
    pub fn rows(&self) -> [usize; 2] {
        match self.lead[..] {
            [b, t] => [b, t],
            _ => [1, self.lead[0]],
        }
    }

    /// The shape of an output of `columns` per head, and of the log-sum-exp.
    pub fn outputs(&self, heads: usize, columns: usize) -> [Vec<usize>; 2] {
        let (tokens, batch) = self.lead.split_last().expect("one or two extents");
        [[&self.lead[..], &[heads, columns]].concat(), [batch, &[heads, *tokens]].concat()]
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        match &self.lengths {
            Lengths::Packed(cu) => cu.len().saturating_sub(1),
            _ => self.lead[0],
        }
    }

    /// The slot of each sequence.
    pub fn slots(&self) -> Vec<usize> {
        self.slots.clone().unwrap_or_else(|| (0..self.sequences()).collect())
    }

    /// Tokens of each sequence.
    pub fn lens(&self) -> Vec<usize> {
        let len =
            |range: Range<i32>| usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0);
        match &self.lengths {
            Lengths::Full => vec![self.lead[1]; self.lead[0]],
            Lengths::Padded(lens) => lens.iter().map(|&end| len(0..end)).collect(),
            Lengths::Ranges(ranges) => ranges.iter().cloned().map(len).collect(),
            Lengths::Packed(cu) => cu.windows(2).map(|cu| len(cu[0]..cu[1])).collect(),
        }
    }

    /// The core's inputs, with this batch.
    pub fn of<'a, T>(&'a self, inputs: Inputs<'a, T>) -> Inputs<'a, T> {
        laid_out!(self, inputs)
    }

    /// The same for a device.
    #[cfg(feature = "cuda")]
    pub fn of_call<'a>(&'a self, call: infini_attn::cuda::Call<'a>) -> infini_attn::cuda::Call<'a> {
        laid_out!(self, call)
    }
}

/// What stands before heads and channels in a shape of that rank.
fn lead<const RANK: usize>(q: &[usize], names: &str) -> PyResult<Vec<usize>> {
    match q.len() == RANK {
        true => Ok(q[..RANK - 2].to_vec()),
        false => Err(error::shape("q", q, format_args!("rank {RANK} {names}"))),
    }
}

/// Integers along one dimension.
fn list<T: TryFrom<i128>>(
    argument: &str,
    object: &Bound<'_, PyAny>,
    shape: &str,
    expected: &str,
) -> PyResult<Vec<T>> {
    let (got, list) = tensor::integers(argument, object)?;
    if got.len() != 1 {
        return Err(error::shape(argument, &got, shape));
    }
    tensor::narrow(argument, list, expected)
}

/// Where the ones of every row of a mask [B, T] lie: side by side.
fn ranges(mask: &Bound<'_, PyAny>, [b, t]: [usize; 2]) -> PyResult<Vec<Range<i32>>> {
    const NAME: &str = "attention_mask";
    let (shape, ones) = tensor::zeros_and_ones(NAME, mask)?;
    if shape != [b, t] {
        let longer = matches!(shape[..], [rows, columns] if rows == b && columns > t && t > 0);
        let hint =
            if longer { format!(", the call's tokens: {NAME}[:, -{t}:]") } else { String::new() };
        return Err(error::shape(NAME, &shape, format_args!("[B, T] = [{b}, {t}]{hint}")));
    }
    // Rows of no tokens are no chunks.
    let rows = (0..b).map(|row| &ones[row * t..(row + 1) * t]);
    rows.enumerate().map(|(row, ones)| range(&format!("{NAME}[{row}]"), ones)).collect()
}

/// Where the ones of a row lie.
fn range(argument: &str, ones: &[bool]) -> PyResult<Range<i32>> {
    let first = ones.iter().position(|one| *one).unwrap_or(0);
    let end = ones.iter().rposition(|one| *one).map_or(first, |last| last + 1);
    if let Some(hole) = ones[first..end].iter().position(|one| !one) {
        let got = format!("0 at {} between ones at {first} and {}", first + hole, end - 1);
        return Err(error::value(argument, got, "ones side by side, zeros around them"));
    }
    match (i32::try_from(first), i32::try_from(end)) {
        (Ok(first), Ok(end)) => Ok(first..end),
        _ => Err(error::value(argument, format_args!("a one at {}", end - 1), "31-bit places")),
    }
}
