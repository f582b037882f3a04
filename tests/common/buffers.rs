//! Strided buffers with guard elements around and between their rows.

use infini_attn::{Element, Outputs, TensorView, TensorViewMut};

use super::metric::coordinates;
use super::{bits, scalar};

/// How the elements of a tensor are arranged in memory. The last dimension is always contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arrangement {
    /// Row-major.
    Contiguous,
    /// Dimensions 1 and 2 swapped in memory: [B, H, T, D] seen as [B, T, H, D] (packed: [H, total,
    /// D]).
    HeadsFirst,
    /// Row-major with guard elements after every row.
    Gaps,
    /// Row-major with the leading two dimensions running backwards (negative strides).
    Reversed,
}

/// Every index of a shape, row-major.
pub fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let shape = shape.to_vec();
    (0..shape.iter().product()).map(move |i| coordinates(i, &shape))
}

/// Guards of buffers that need no alignment.
pub const MARGIN: usize = 5;

/// A buffer and the view onto it; everything outside of the view is guard.
#[derive(Clone, Debug)]
pub struct Strided<T> {
    data: Vec<T>,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<i64>,
    guard: T,
}

impl<T: Element> Strided<T> {
    /// A buffer of guards; the view onto it has `shape`.
    pub fn new(shape: &[usize], arrangement: Arrangement, guard: f32) -> Self {
        Self::with_margin(shape, arrangement, guard, MARGIN)
    }

    /// The same with another number of guards before and after the view, and after every row
    /// under [`Arrangement::Gaps`].
    pub fn with_margin(
        shape: &[usize],
        arrangement: Arrangement,
        guard: f32,
        margin: usize,
    ) -> Self {
        let rank = shape.len();
        let mut order: Vec<usize> = (0..rank).collect();
        if arrangement == Arrangement::HeadsFirst && rank >= 3 {
            order.swap(rank - 3, rank - 2);
        }
        let mut strides = vec![0i64; rank];
        let mut step = 1i64;
        for &d in order.iter().rev() {
            strides[d] = step;
            step *= shape[d] as i64;
            if d == rank - 1 && arrangement == Arrangement::Gaps {
                step += margin as i64;
            }
        }
        let mut offset = margin;
        if arrangement == Arrangement::Reversed {
            for d in 0..rank.saturating_sub(1).min(2) {
                offset += strides[d] as usize * shape[d].saturating_sub(1);
                strides[d] = -strides[d];
            }
        }
        let guard = scalar(guard);
        let data = vec![guard; step as usize + 2 * margin];
        Self { data, offset, shape: shape.to_vec(), strides, guard }
    }

    pub fn view(&self) -> TensorView<'_, T> {
        TensorView::strided(&self.data, self.offset, &self.shape, &self.strides)
            .expect("the buffer was made for this view")
    }

    pub fn view_mut(&mut self) -> TensorViewMut<'_, T> {
        TensorViewMut::strided(&mut self.data, self.offset, &self.shape, &self.strides)
            .expect("the buffer was made for this view")
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements from one index to the next, per dimension.
    pub fn strides(&self) -> &[i64] {
        &self.strides
    }

    /// Where index 0 of every dimension lies in [`Self::data`].
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The whole buffer, guards included.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    fn index(&self, at: &[usize]) -> usize {
        let steps = at.iter().zip(&self.strides).map(|(&i, &s)| i as i64 * s);
        (self.offset as i64 + steps.sum::<i64>()) as usize
    }

    pub fn get(&self, at: &[usize]) -> T {
        self.data[self.index(at)]
    }

    pub fn set(&mut self, at: &[usize], value: T) {
        let i = self.index(at);
        self.data[i] = value;
    }

    /// The row at a leading index: contiguous.
    pub fn row(&self, lead: &[usize]) -> &[T] {
        let width = self.shape[self.shape.len() - 1];
        let start = self.index(&[lead, &[0]].concat());
        &self.data[start..start + width]
    }

    pub fn set_row(&mut self, lead: &[usize], row: &[T]) {
        let start = self.index(&[lead, &[0]].concat());
        self.data[start..start + row.len()].copy_from_slice(row);
    }

    /// Sets every element, row-major, rounded.
    pub fn assign(&mut self, values: &[f64]) {
        for (at, &x) in indices(&self.shape).zip(values) {
            self.set(&at, scalar(x as f32));
        }
    }

    /// Whether every element outside of the view still has the guard's bits.
    pub fn guards_intact(&self) -> bool {
        let mut inside = vec![false; self.data.len()];
        indices(&self.shape).for_each(|at| inside[self.index(&at)] = true);
        let guard = bits(&[self.guard]);
        self.data.iter().zip(inside).all(|(&x, inside)| inside || bits(&[x]) == guard)
    }

    /// Every bit of the buffer, guards included.
    pub fn bits(&self) -> Vec<u8> {
        bits(&self.data)
    }
}

/// Output buffers of one call.
#[derive(Clone, Debug)]
pub struct OutputBuffers<T> {
    pub o: Strided<T>,
    pub lse: Option<Strided<f32>>,
    pub a_dot: Option<Strided<T>>,
    pub a_mem: Option<Strided<T>>,
}

/// What outputs hold before a call: a value no case computes.
pub const CANARY: f32 = -77.25;

impl<T: Element> OutputBuffers<T> {
    /// Buffers for outputs of shape `lead` + [Hq, Dv], filled with [`CANARY`].
    pub fn new(lead: &[usize], heads: usize, dv: usize, how: Arrangement, asked: Asked) -> Self {
        Self::with_margin(lead, heads, dv, how, asked, MARGIN)
    }

    /// The same with another number of guards.
    pub fn with_margin(
        lead: &[usize],
        heads: usize,
        dv: usize,
        how: Arrangement,
        asked: Asked,
        margin: usize,
    ) -> Self {
        let main = || Strided::with_margin(&[lead, &[heads, dv]].concat(), how, CANARY, margin);
        let (batch, tokens) = lead.split_at(lead.len() - 1);
        // Tokens are lse's last dimension, so heads and batch are what may be rearranged.
        let lse = Strided::with_margin(
            &[batch, &[heads], tokens].concat(),
            how.for_lse(),
            CANARY,
            margin,
        );
        Self {
            o: main(),
            lse: asked.lse.then_some(lse),
            a_dot: asked.a_dot.then(main),
            a_mem: asked.a_mem.then(main),
        }
    }

    pub fn views(&mut self) -> Outputs<'_, T> {
        let mut outputs = Outputs::new(self.o.view_mut());
        if let Some(lse) = &mut self.lse {
            outputs = outputs.lse(lse.view_mut());
        }
        if let Some(a_dot) = &mut self.a_dot {
            outputs = outputs.a_dot(a_dot.view_mut());
        }
        if let Some(a_mem) = &mut self.a_mem {
            outputs = outputs.a_mem(a_mem.view_mut());
        }
        outputs
    }

    /// The [.., Hq, Dv] outputs by name.
    pub fn named(&self) -> [(&'static str, Option<&Strided<T>>); 3] {
        [("o", Some(&self.o)), ("a_dot", self.a_dot.as_ref()), ("a_mem", self.a_mem.as_ref())]
    }

    pub fn guards_intact(&self) -> bool {
        self.named().iter().all(|(_, b)| b.is_none_or(Strided::guards_intact))
            && self.lse.as_ref().is_none_or(Strided::guards_intact)
    }

    pub fn bits(&self) -> Vec<u8> {
        let mut all: Vec<u8> = Vec::new();
        self.named().iter().for_each(|(_, b)| all.extend(b.iter().flat_map(|b| b.bits())));
        all.extend(self.lse.iter().flat_map(Strided::bits));
        all
    }
}

impl Arrangement {
    fn for_lse(self) -> Self {
        match self {
            Arrangement::HeadsFirst => Arrangement::Gaps,
            other => other,
        }
    }
}

/// Which outputs besides o are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Asked {
    pub lse: bool,
    pub a_dot: bool,
    pub a_mem: bool,
}

impl Asked {
    pub const ALL: Asked = Asked { lse: true, a_dot: true, a_mem: true };
    pub const NONE: Asked = Asked { lse: false, a_dot: false, a_mem: false };
}
