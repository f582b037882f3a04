//! Which tokens of a call belong to which sequence, and how they are rotated.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use infini_attn::Slots;

use crate::error::{refused, zeros};
use crate::state::State;

/// How a call's tokens are laid out, which slots they go to, and their rotation. By default every sequence
/// is T tokens long, sequence b goes to slot b, and nothing is rotated.
///
/// ```
/// # use infini_attn_candle::Batch;
/// // Two sequences of 3 tokens and 1 in one row, for slots 5 and 2.
/// let batch = Batch::new().cu_seqlens(&[0, 3, 4]).slots(&[5, 2]);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    pub(crate) lengths: Lengths<'a>,
    pub(crate) slots: Option<&'a [usize]>,
    pub(crate) rope: Option<&'a Rope>,
    pub(crate) positions: Option<&'a [i64]>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Lengths<'a> {
    #[default]
    Full,
    Padded(&'a [i32]),
    Ranges(&'a [Range<i32>]),
    Packed(&'a [i32]),
}

impl<'a> Batch<'a> {
    /// Sequences of T tokens in slots 0, 1, ...
    pub fn new() -> Self {
        Self::default()
    }

    /// A batch padded on the right: sequence b has `lens[b]` ≤ T tokens. Rows of padding come out as 0.
    pub fn seq_lens(mut self, lens: &'a [i32]) -> Self {
        self.lengths = Lengths::Padded(lens);
        self
    }

    /// A batch padded on either side: sequence b is the tokens `ranges[b]` of its row.
    pub fn seq_ranges(mut self, ranges: &'a [Range<i32>]) -> Self {
        self.lengths = Lengths::Ranges(ranges);
        self
    }

    /// A packed batch: tensors are [total, H, D], sequence b is the tokens `cu[b]..cu[b + 1]`.
    pub fn cu_seqlens(mut self, cu: &'a [i32]) -> Self {
        self.lengths = Lengths::Packed(cu);
        self
    }

    /// The slot of each sequence, all distinct. Without it sequence b uses slot b of a state of B slots.
    pub fn slots(mut self, slots: &'a [usize]) -> Self {
        self.slots = Some(slots);
        self
    }

    /// Rotates q and k in the local branch, each token by the row of its place in its segment.
    pub fn rope(mut self, rope: &'a Rope) -> Self {
        self.rope = Some(rope);
        self
    }

    /// Rows of the tables of [`Self::rope`] instead: T of them (shared by all sequences) or B·T, of a packed
    /// batch total.
    pub fn positions(mut self, positions: &'a [i64]) -> Self {
        self.positions = Some(positions);
        self
    }

    /// The place in its segment of each of `dims`' tokens. What is wrong with lengths and slots is left for
    /// the call to say.
    pub(crate) fn places(&self, dims: &[usize], state: &State) -> Result<Vec<i64>> {
        let (batch, tokens) = match *dims {
            [total, _, _] => (1, total),
            [batch, tokens, _, _] => (batch, tokens),
            _ => return Ok(vec![]),
        };
        let segment = state.problem().segment_len();
        let mut places = zeros(&[batch, tokens], "positions")?;
        let mut fill = |b: usize, row: usize, range: Range<i32>| {
            let slot = self.slots.map_or(Some(b), |slots| slots.get(b).copied());
            let open = match slot.filter(|&slot| slot < state.sequences()) {
                Some(slot) => state.open_len(slot),
                None => 0,
            };
            let range = clamped(range, tokens);
            let row = &mut places[row * tokens..][range];
            (0..).zip(row).for_each(|(t, place)| *place = ((open + t) % segment) as i64);
        };
        match self.lengths {
            Lengths::Full => (0..batch).for_each(|b| fill(b, b, 0..i32::MAX)),
            Lengths::Padded(lens) => {
                (0..batch).zip(lens).for_each(|(b, &len)| fill(b, b, 0..len));
            }
            Lengths::Ranges(ranges) => {
                (0..batch).zip(ranges).for_each(|(b, range)| fill(b, b, range.clone()));
            }
            Lengths::Packed(cu) => {
                cu.windows(2).enumerate().for_each(|(b, cu)| fill(b, 0, cu[0]..cu[1]));
            }
        }
        Ok(places)
    }

    pub(crate) fn packed(&self) -> bool {
        matches!(self.lengths, Lengths::Packed(_))
    }
}

/// The part of a range that there is.
fn clamped(range: Range<i32>, tokens: usize) -> Range<usize> {
    let at = |i: i32| usize::try_from(i).unwrap_or(0).min(tokens);
    at(range.start)..at(range.end).max(at(range.start))
}

/// Rotary position embedding of the local branch, which attends inside segments of N tokens. So N rows of
/// tables serve streams of any length: a token's row is its place in its segment.
#[derive(Clone, Debug)]
pub struct Rope {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    pub(crate) interleaved: bool,
}

impl Rope {
    /// Of tables [rows, R/2], which are copied, as f32. Channel i pairs with i + R/2; channels from R on
    /// are not rotated.
    ///
    /// # Errors
    /// For tables that are not of rank 2 and one shape.
    pub fn new(cos: &Tensor, sin: &Tensor) -> Result<Self> {
        if cos.rank() != 2 {
            return Err(refused("cos", format!("shape {:?}", cos.dims()), "shape [rows, R/2]"));
        }
        if cos.dims() != sin.dims() {
            let expected = format!("{:?} (that of cos)", cos.dims());
            return Err(refused("sin", format!("shape {:?}", sin.dims()), expected));
        }
        let own = |table: &Tensor| table.to_dtype(DType::F32)?.force_contiguous();
        Ok(Self { cos: own(cos)?, sin: own(sin)?, interleaved: false })
    }

    /// The tables of so many rows for angular frequencies: one for each pair of channels, in radians per
    /// token. Angles are computed in float64.
    ///
    /// # Errors
    /// For memory that is not there.
    pub fn of_frequencies(frequencies: &[f64], rows: usize, device: &Device) -> Result<Self> {
        let columns = frequencies.len();
        let shape = [rows, columns];
        let (mut cos, mut sin) = (zeros::<f32>(&shape, "cos")?, zeros::<f32>(&shape, "sin")?);
        for (i, (cos, sin)) in cos.iter_mut().zip(&mut sin).enumerate() {
            let angle = (i / columns) as f64 * frequencies[i % columns];
            (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
        }
        let table = |values| Tensor::from_vec(values, &shape, device);
        Ok(Self { cos: table(cos)?, sin: table(sin)?, interleaved: false })
    }

    /// Pairs channel 2i with 2i + 1 instead of i with i + R/2.
    pub fn interleaved(mut self, interleaved: bool) -> Self {
        self.interleaved = interleaved;
        self
    }
}
