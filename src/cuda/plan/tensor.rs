//! Tensors in device memory, described without their addresses.

use super::address::{Operand, Requirement};
use super::params::InfiniTensor;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Layout;

/// Alignment of the rows of q, k, v and the outputs, in bytes: what one thread copies at a time.
pub(crate) const ROW_ALIGN: usize = 16;

/// Element type, shape and strides of a tensor of rank 1 to 4 in device memory. Its address, that of
/// element (0, …, 0), comes when a plan runs.
///
/// ```
/// use infini_attn::{DType, cuda::DeviceTensor};
/// // stored [B, H, T, D], seen as [B, T, H, D]
/// let q = DeviceTensor::strided(DType::BF16, &[2, 8, 4, 64], &[2048, 64, 512, 1])?;
/// assert_eq!(q.shape(), [2, 8, 4, 64]);
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceTensor {
    dtype: DType,
    layout: Layout,
}

impl DeviceTensor {
    /// A row-major tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] for a rank outside 1 to 4, [`Error::Stride`] for 2^62 elements or more.
    pub fn contiguous(dtype: DType, shape: &[usize]) -> Result<Self> {
        Ok(Self { dtype, layout: Layout::contiguous(shape)? })
    }

    /// A tensor with the given strides, in elements.
    ///
    /// # Errors
    /// As [`Self::contiguous`], and [`Error::Length`] when there is not one stride per dimension.
    pub fn strided(dtype: DType, shape: &[usize], strides: &[i64]) -> Result<Self> {
        Ok(Self { dtype, layout: Layout::new(shape, strides)? })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[i64] {
        self.layout.strides()
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// The rows of a 16-bit tensor must start at multiples of 16 bytes; a dimension of one entry is
    /// never stepped along.
    pub(crate) fn check_row_align(&self, argument: &'static str) -> Result<()> {
        let elements = (ROW_ALIGN / self.dtype.bytes()) as i64;
        let outer = self.shape().iter().zip(self.strides()).take(self.shape().len() - 1);
        let mut stepped = outer.filter(|(extent, _)| **extent > 1);
        if self.layout.is_empty() || stepped.all(|(_, stride)| stride % elements == 0) {
            return Ok(());
        }
        Err(Error::Stride {
            argument,
            got: self.strides().to_vec(),
            requirement: "all but the last must be multiples of 8 (16 bytes)",
        })
    }

    /// A [B, T, H, D] or packed [total, H, D] tensor as launch parameter.
    pub(crate) fn rows(&self, operand: Operand) -> InfiniTensor {
        match *self.steps() {
            [batch, token, head, _] => InfiniTensor { data: operand.at(0), batch, token, head },
            [token, head, _] => InfiniTensor { data: operand.at(0), batch: 0, token, head },
            _ => InfiniTensor::default(),
        }
    }

    /// A [B, H, T] or packed [H, total] tensor as launch parameter.
    pub(crate) fn head_rows(&self, operand: Operand) -> InfiniTensor {
        match *self.steps() {
            [batch, head, _] => InfiniTensor { data: operand.at(0), batch, token: 1, head },
            [head, _] => InfiniTensor { data: operand.at(0), batch: 0, token: 1, head },
            _ => InfiniTensor::default(),
        }
    }

    /// Strides, 0 where they are never taken.
    fn steps(&self) -> Vec<i64> {
        let step = |(&extent, &stride): (&usize, &i64)| if extent > 1 { stride } else { 0 };
        self.shape().iter().zip(self.strides()).map(step).collect()
    }

    /// The stride of the first dimension.
    pub(crate) fn outer_stride(&self) -> i64 {
        self.steps()[0]
    }

    /// What a run must give for this tensor; nothing for one without elements.
    pub(crate) fn requirement(&self, operand: Operand, align: usize) -> Option<Requirement> {
        let (low, high) = self.layout.span().filter(|_| !self.layout.is_empty())?;
        let bytes = self.dtype.bytes() as u64;
        let (before, after) = (bytes * low.unsigned_abs(), bytes * (high as u64 + 1));
        Some(Requirement { operand, align: align as u64, before, after })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_start_at_multiples_of_16_bytes() {
        let check = |shape: &[usize], strides: &[i64]| {
            let tensor = DeviceTensor::strided(DType::F16, shape, strides).expect("valid");
            tensor.check_row_align("k")
        };
        check(&[2, 3, 4, 64], &[-1024, 0, 64, 1]).expect("aligned");
        check(&[1, 3, 1, 64], &[7, 256, 9, 1]).expect("never stepped along");
        check(&[2, 0, 4, 64], &[3, 3, 3, 1]).expect("empty");
        let error = check(&[2, 3, 4, 64], &[1024, 260, 64, 1]).expect_err("4 elements too many");
        assert_eq!(
            error.to_string(),
            "k: strides [1024, 260, 64, 1] (in elements) given, all but the last must be multiples of 8 \
             (16 bytes)"
        );
    }

    #[test]
    fn launch_parameters_of_tensors() {
        let four =
            DeviceTensor::strided(DType::F16, &[1, 3, 4, 8], &[5, -32, 8, 1]).expect("valid");
        let rows = four.rows(Operand::Q);
        let expected = (Operand::Q.at(0), 0, -32, 8);
        assert_eq!((rows.data, rows.batch, rows.token, rows.head), expected);
        let need = four.requirement(Operand::Q, 16).expect("elements");
        assert_eq!((need.before, need.after), (2 * 64, 2 * 32));
        let lse = DeviceTensor::contiguous(DType::F32, &[2, 4, 3]).expect("valid");
        let rows = lse.head_rows(Operand::Lse);
        assert_eq!((rows.batch, rows.token, rows.head), (12, 1, 3));
        let packed = DeviceTensor::contiguous(DType::F16, &[7, 4, 8]).expect("valid");
        let rows = packed.rows(Operand::K);
        assert_eq!((rows.batch, rows.token, rows.head), (0, 32, 8));
        let empty = DeviceTensor::contiguous(DType::F16, &[0, 4, 8]).expect("valid");
        assert_eq!(empty.requirement(Operand::K, 16), None);
    }
}
