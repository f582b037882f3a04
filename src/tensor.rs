//! Strided views: shape and i64 strides over memory the caller owns.

use std::marker::PhantomData;

use crate::error::{Error, Result};

/// Highest rank a view can have.
pub const MAX_RANK: usize = 4;

/// Shape and strides (in elements) of a view, wherever its memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [i64; MAX_RANK],
}

impl Layout {
    pub fn new(shape: &[usize], strides: &[i64]) -> Result<Self> {
        if shape.is_empty() || shape.len() > MAX_RANK {
            return Err(Error::shape("shape", shape, format!("rank 1 to {MAX_RANK}")));
        }
        if strides.len() != shape.len() {
            let expected = format!("{} (the rank)", shape.len());
            return Err(Error::Length { argument: "strides", got: strides.len(), expected });
        }
        let mut layout = Layout { rank: shape.len(), shape: [1; MAX_RANK], strides: [0; MAX_RANK] };
        layout.shape[..shape.len()].copy_from_slice(shape);
        // A stride of an empty view leads nowhere: rows without elements stand at its beginning.
        if !layout.is_empty() {
            layout.strides[..shape.len()].copy_from_slice(strides);
        }
        match layout.span() {
            Some(_) => Ok(layout),
            None => Err(Error::Stride {
                argument: "strides",
                got: strides.to_vec(),
                requirement: "the view must span fewer than 2^62 elements",
            }),
        }
    }

    pub fn contiguous(shape: &[usize]) -> Result<Self> {
        let mut strides = [0i64; MAX_RANK];
        let mut step = 1i64;
        for (stride, &extent) in strides.iter_mut().take(shape.len()).zip(shape).rev() {
            *stride = step;
            step = step.saturating_mul(extent.max(1) as i64);
        }
        Self::new(shape, &strides[..shape.len().min(MAX_RANK)])
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    pub fn strides(&self) -> &[i64] {
        &self.strides[..self.rank]
    }

    pub fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }

    /// Lowest and highest element offset reached, relative to element (0, …, 0); None when it does
    /// not fit 62 bits.
    pub fn span(&self) -> Option<(i64, i64)> {
        let (mut low, mut high) = (0i64, 0i64);
        if self.is_empty() {
            return Some((0, 0));
        }
        for (&extent, &stride) in self.shape().iter().zip(self.strides()) {
            let reach = i64::try_from(extent - 1).ok()?.checked_mul(stride)?;
            let side = if reach < 0 { &mut low } else { &mut high };
            *side = side.checked_add(reach).filter(|v| v.unsigned_abs() < 1 << 62)?;
        }
        Some((low, high))
    }

    /// True when no two indices reach the same element: sorted by stride, each dimension steps over
    /// everything the smaller ones span.
    fn is_injective(&self) -> bool {
        if self.is_empty() {
            return true;
        }
        let step = |i: usize| (self.strides[i].unsigned_abs(), self.shape[i] as u64 - 1);
        let mut reach = 0u64;
        let mut dims: [(u64, u64); MAX_RANK] = std::array::from_fn(step);
        dims.sort_unstable();
        let steps = dims.iter().filter(|(_, steps)| *steps > 0);
        steps.copied().all(|(stride, steps)| {
            let ok = stride > reach;
            reach += stride * steps;
            ok
        })
    }

    /// The last dimension must be contiguous for the kernels; everything else is free (all of it in
    /// an empty tensor).
    pub fn check_rows(&self, argument: &'static str) -> Result<()> {
        let (extent, stride) = (self.shape[self.rank - 1], self.strides[self.rank - 1]);
        if extent > 1 && stride != 1 && !self.is_empty() {
            return Err(Error::Stride {
                argument,
                got: self.strides().to_vec(),
                requirement: "the last dimension must be contiguous (stride 1)",
            });
        }
        Ok(())
    }

    /// The shape must be that of `expected`, one part after another.
    pub fn check_shape(
        &self,
        argument: &'static str,
        expected: &[&[usize]],
        names: &str,
    ) -> Result<()> {
        if !self.shape().iter().eq(expected.iter().copied().flatten()) {
            let expected = format!("{names} = {:?}", expected.concat());
            return Err(Error::shape(argument, self.shape(), expected));
        }
        Ok(())
    }

    /// Writable tensors: no two indices may reach the same element.
    pub fn check_injective(&self, argument: &'static str) -> Result<()> {
        if self.is_injective() {
            return Ok(());
        }
        Err(Error::Stride {
            argument,
            got: self.strides().to_vec(),
            requirement: "no two indices of a writable view may reach the same element",
        })
    }

    pub fn check_within(&self, offset: usize, len: usize) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        // `new` has checked that the span exists.
        let (low, high) = self.span().unwrap_or((i64::MIN / 2, i64::MAX / 2));
        let (first, last) = (offset as i128 + low as i128, offset as i128 + high as i128);
        if first < 0 || last >= len as i128 {
            let expected =
                format!("a buffer holding elements {first} to {last} of shape {:?}", self.shape());
            return Err(Error::Length { argument: "data", got: len, expected });
        }
        Ok(())
    }

    /// Where a view starts: without elements anywhere, but where empty rows may stand.
    fn start<T>(&self, ptr: *mut T) -> *mut T {
        if self.is_empty() { std::ptr::NonNull::dangling().as_ptr() } else { ptr }
    }

    fn check_start<T>(&self, ptr: *const T) -> Result<()> {
        if ptr.is_null() && !self.is_empty() {
            let requirement = format!("that of {:?} elements expected", self.shape());
            return Err(Error::Address { argument: "data".into(), got: 0, requirement });
        }
        Ok(())
    }

    /// Offset of a full index. Panics on a wrong rank or an index out of range.
    fn offset(&self, index: &[usize]) -> isize {
        assert_eq!(index.len(), self.rank, "index rank");
        let mut offset = 0i64;
        for ((&i, &extent), &stride) in index.iter().zip(self.shape()).zip(self.strides()) {
            assert!(i < extent, "index {index:?} out of shape {:?}", self.shape());
            offset += i as i64 * stride;
        }
        offset as isize
    }

    /// Strides as (batch, token, head) for a [B, T, H, D] or packed [total, H, D] tensor.
    pub fn row_strides(&self) -> [isize; 3] {
        let s = |i: usize| self.strides[i] as isize;
        if self.rank == 4 { [s(0), s(1), s(2)] } else { [0, s(0), s(1)] }
    }

    /// Strides as (batch, 0, head) for a [B, H, T] or packed [H, total] tensor.
    pub fn head_row_strides(&self) -> [isize; 3] {
        let s = |i: usize| self.strides[i] as isize;
        if self.rank == 3 { [s(0), 0, s(1)] } else { [0, 0, s(0)] }
    }
}

macro_rules! view_accessors {
    () => {
        /// Extents, outermost first.
        pub fn shape(&self) -> &[usize] {
            self.layout.shape()
        }

        /// Strides in elements, outermost first.
        pub fn strides(&self) -> &[i64] {
            self.layout.strides()
        }

        /// Shape and strides.
        pub(crate) fn layout(&self) -> Layout {
            self.layout
        }
    };
}

/// A read-only strided view of a tensor of rank 1 to 4. Strides are free, zero and negative ones
/// included; the operator asks only that the last dimension be contiguous. Nothing is copied to
/// satisfy a layout.
///
/// ```
/// use infini_attn::TensorView;
/// let data = vec![0.0f32; 2 * 8 * 4 * 64];
/// // stored [B, H, T, D], seen as [B, T, H, D]
/// let view = TensorView::strided(&data, 0, &[2, 8, 4, 64], &[2048, 64, 512, 1])?;
/// assert_eq!(view.shape(), [2, 8, 4, 64]);
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Debug)]
pub struct TensorView<'a, T> {
    ptr: *const T,
    layout: Layout,
    data: PhantomData<&'a [T]>,
}

impl<T> Clone for TensorView<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for TensorView<'_, T> {}

// SAFETY: a view is a shared borrow of a [T].
unsafe impl<T: Sync> Send for TensorView<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for TensorView<'_, T> {}

impl<'a, T> TensorView<'a, T> {
    /// A contiguous row-major view of the whole of `data`.
    ///
    /// # Errors
    /// [`Error::Length`] when `data` does not have exactly the elements of `shape`.
    pub fn new(data: &'a [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(shape)?;
        check_len(data.len(), shape)?;
        Ok(Self { ptr: data.as_ptr(), layout, data: PhantomData })
    }

    /// A view whose element (0, …, 0) is `data[offset]`.
    ///
    /// # Errors
    /// [`Error::Length`] when an index would reach outside `data`.
    pub fn strided(data: &'a [T], offset: usize, shape: &[usize], strides: &[i64]) -> Result<Self> {
        let layout = Layout::new(shape, strides)?;
        layout.check_within(offset, data.len())?;
        let ptr = layout.start(data.as_ptr().wrapping_add(offset).cast_mut());
        Ok(Self { ptr, layout, data: PhantomData })
    }

    /// A view of memory that Rust does not own (NumPy, PyTorch, another allocator).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Length`] or [`Error::Stride`] for a rank outside 1 to 4, or
    /// strides of another rank, [`Error::Address`] for a null pointer to elements.
    ///
    /// # Safety
    /// For `'a`, every element that an index within `shape` reaches from `ptr` by `strides` (in
    /// elements) must be initialised, aligned, inside one allocation and not written to.
    pub unsafe fn from_raw(ptr: *const T, shape: &[usize], strides: &[i64]) -> Result<Self> {
        let layout = Layout::new(shape, strides)?;
        layout.check_start(ptr)?;
        Ok(Self { ptr: layout.start(ptr.cast_mut()), layout, data: PhantomData })
    }

    view_accessors!();

    /// The elements as one slice, if they stand contiguously in row-major order.
    pub fn as_slice(&self) -> Option<&'a [T]> {
        let mut step = 1i64;
        for (&extent, &stride) in self.shape().iter().zip(self.strides()).rev() {
            if extent > 1 && stride != step && !self.layout.is_empty() {
                return None;
            }
            step = step.saturating_mul(extent as i64);
        }
        if self.layout.is_empty() {
            return Some(&[]);
        }
        // SAFETY: the view may read every element that its shape reaches; here these are the `step`
        // elements from `ptr` on.
        Some(unsafe { std::slice::from_raw_parts(self.ptr, step as usize) })
    }

    /// The element at a full index.
    ///
    /// # Panics
    /// When the index has another rank or lies outside the shape.
    pub fn at(&self, index: &[usize]) -> T
    where
        T: Copy,
    {
        // SAFETY: `offset` checks the index; every index inside the shape is readable.
        unsafe { *self.ptr.offset(self.layout.offset(index)) }
    }

    /// Row access for tensors whose last dimension has passed `check_rows`.
    pub(crate) fn rows(&self) -> Rows<'a, T> {
        Rows {
            ptr: self.ptr,
            strides: self.layout.row_strides(),
            width: self.layout.shape[self.layout.rank - 1],
            data: PhantomData,
        }
    }

    /// Rows of a [B, H, T] (or packed [H, total]) tensor: one row per (batch, head).
    pub(crate) fn head_rows(&self) -> Rows<'a, T> {
        Rows { strides: self.layout.head_row_strides(), ..self.rows() }
    }
}

/// A strided view that may be written; no two of its indices reach the same element.
#[derive(Debug)]
pub struct TensorViewMut<'a, T> {
    ptr: *mut T,
    layout: Layout,
    data: PhantomData<&'a mut [T]>,
}

// SAFETY: a mutable view is a unique borrow of a [T].
unsafe impl<T: Send> Send for TensorViewMut<'_, T> {}
// SAFETY: `&TensorViewMut` gives read access only.
unsafe impl<T: Sync> Sync for TensorViewMut<'_, T> {}

impl<'a, T> TensorViewMut<'a, T> {
    /// A contiguous row-major view of the whole of `data`.
    ///
    /// # Errors
    /// [`Error::Length`] when `data` does not have exactly the elements of `shape`.
    pub fn new(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(shape)?;
        check_len(data.len(), shape)?;
        Ok(Self { ptr: data.as_mut_ptr(), layout, data: PhantomData })
    }

    /// A view whose element (0, …, 0) is `data[offset]`.
    ///
    /// # Errors
    /// [`Error::Length`] when an index would reach outside `data`, [`Error::Stride`] when two
    /// indices could reach the same element.
    pub fn strided(
        data: &'a mut [T],
        offset: usize,
        shape: &[usize],
        strides: &[i64],
    ) -> Result<Self> {
        let layout = Layout::new(shape, strides)?;
        layout.check_within(offset, data.len())?;
        layout.check_injective("strides")?;
        let ptr = layout.start(data.as_mut_ptr().wrapping_add(offset));
        Ok(Self { ptr, layout, data: PhantomData })
    }

    /// A view of memory that Rust does not own.
    ///
    /// # Errors
    /// As [`TensorView::from_raw`], and [`Error::Stride`] when two indices could reach the same
    /// element.
    ///
    /// # Safety
    /// As [`TensorView::from_raw`], and nothing else may read or write those elements during `'a`.
    pub unsafe fn from_raw(ptr: *mut T, shape: &[usize], strides: &[i64]) -> Result<Self> {
        let layout = Layout::new(shape, strides)?;
        layout.check_injective("strides")?;
        layout.check_start(ptr)?;
        Ok(Self { ptr: layout.start(ptr), layout, data: PhantomData })
    }

    view_accessors!();

    /// The same memory, read-only.
    pub fn view(&self) -> TensorView<'_, T> {
        TensorView { ptr: self.ptr, layout: self.layout, data: PhantomData }
    }

    pub(crate) fn rows(&mut self) -> RowsMut<'_, T> {
        self.rows_by(self.layout.row_strides())
    }

    /// Rows of a [B, H, T] (or packed [H, total]) tensor: one row per (batch, head).
    pub(crate) fn head_rows(&mut self) -> RowsMut<'_, T> {
        self.rows_by(self.layout.head_row_strides())
    }

    fn rows_by(&mut self, strides: [isize; 3]) -> RowsMut<'_, T> {
        let width = self.layout.shape[self.layout.rank - 1];
        RowsMut { ptr: self.ptr, strides, width, data: PhantomData }
    }
}

pub(crate) fn check_len(got: usize, shape: &[usize]) -> Result<()> {
    let expected = shape.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
    if expected != Some(got) {
        let expected = format!("the product of {shape:?}");
        return Err(Error::Length { argument: "data", got, expected });
    }
    Ok(())
}

/// Rows (the last dimension) of a [batch, token, head, width] tensor; packed tensors have batch 0.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    ptr: *const T,
    strides: [isize; 3],
    width: usize,
    data: PhantomData<&'a [T]>,
}

// SAFETY: a shared borrow, as the view it was made from.
unsafe impl<T: Sync> Send for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}

impl<'a, T> Rows<'a, T> {
    /// # Safety
    /// The index must lie inside the view's shape.
    pub(crate) unsafe fn row(&self, batch: usize, token: usize, head: usize) -> &'a [T] {
        let at = [batch, token, head];
        let offset: isize = at.iter().zip(self.strides).map(|(&i, s)| i as isize * s).sum();
        // SAFETY: inside the view by the caller's promise; rows are contiguous (`check_rows`).
        unsafe { std::slice::from_raw_parts(self.ptr.offset(offset), self.width) }
    }
}

/// Writable rows, handed out to several threads at once.
pub(crate) struct RowsMut<'a, T> {
    ptr: *mut T,
    strides: [isize; 3],
    width: usize,
    data: PhantomData<&'a mut [T]>,
}

// SAFETY: rows are disjoint (the view is injective) and `row` is unsafe to call twice for one row.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<T> RowsMut<'_, T> {
    /// # Safety
    /// The index must lie inside the view's shape, and no other borrow of the same row may live.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(&self, batch: usize, token: usize, head: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.part([batch, token, head], 0..self.width) }
    }

    /// # Safety
    /// As [`Self::row`], for the elements `range` of the row.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, at: [usize; 3], range: std::ops::Range<usize>) -> &mut [T] {
        debug_assert!(range.end <= self.width);
        let offset: isize = at.iter().zip(self.strides).map(|(&i, s)| i as isize * s).sum();
        // SAFETY: inside the view and unshared by the caller's promise.
        unsafe {
            let start = self.ptr.offset(offset).add(range.start);
            std::slice::from_raw_parts_mut(start, range.len())
        }
    }
}
