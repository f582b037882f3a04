//! DLPack: the memory of a NumPy array or a PyTorch tensor, borrowed without a copy.
//!
//! A capsule from `__dlpack__` is borrowed, never consumed: it keeps its name, so its own
//! destructor hands the memory back to the producer when [`Memory`], which holds the only reference
//! to it, is dropped.

use std::ffi::c_void;
use std::fmt::Display;
use std::ptr::NonNull;

use half::{bf16, f16};
use infini_attn::{MAX_RANK, TensorView, TensorViewMut};
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyCapsule};

use crate::error;

/// `DLDevice` of dlpack.h.
#[repr(C)]
struct Device {
    kind: i32,
    index: i32,
}

/// `DLDataType` of dlpack.h.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor` of dlpack.h, which is also how `DLManagedTensor` begins.
#[repr(C)]
struct RawTensor {
    data: *mut c_void,
    device: Device,
    rank: i32,
    dtype: DataType,
    /// Extents, one per dimension.
    shape: *const i64,
    /// Strides in elements, one per dimension; null when row-major.
    strides: *const i64,
    /// From `data` to element (0, …, 0).
    byte_offset: u64,
}

/// `DLManagedTensorVersioned` of dlpack.h, major version 1.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    manager: *mut c_void,
    deleter: *mut c_void,
    flags: u64,
    tensor: RawTensor,
}

/// `kDLCPU`.
const CPU: i32 = 1;
/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
const READ_ONLY: u64 = 1;

/// An element type that can be read from or written to Python's memory.
///
/// # Safety
/// `DATA_TYPE` describes the type, and every bit pattern is a value of it.
pub unsafe trait Scalar: Copy + 'static {
    const DATA_TYPE: DataType;
    /// What NumPy and PyTorch call it.
    const NAME: &str;
}

macro_rules! scalars {
    ($($type:ty: $name:literal, $code:literal, $bits:literal;)+) => {$(
        // SAFETY: kDLInt is 0, kDLFloat 2, kDLBfloat 4; plain numbers.
        unsafe impl Scalar for $type {
            const DATA_TYPE: DataType = DataType { code: $code, bits: $bits, lanes: 1 };
            const NAME: &str = $name;
        }
    )+};
}

scalars! {
    f32: "float32", 2, 32;
    f64: "float64", 2, 64;
    f16: "float16", 2, 16;
    bf16: "bfloat16", 4, 16;
    i64: "int64", 0, 64;
}

/// Calls a generic function for the element type of an argument, one of those the operator takes.
macro_rules! by_dtype {
    ($memory:expr, $function:ident($($args:expr),*)) => {
        match $memory.data_type() {
            f32::DATA_TYPE => $function::<f32>($($args),*),
            half::f16::DATA_TYPE => $function::<half::f16>($($args),*),
            half::bf16::DATA_TYPE => $function::<half::bf16>($($args),*),
            _ => Err($memory.wrong_dtype("f32, f16 or bf16")),
        }
    };
}
pub(crate) use by_dtype;

impl Display for DataType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.code {
            0 => "i",
            1 => "u",
            2 => "f",
            4 => "bf",
            5 => "complex",
            6 => "bool",
            code => return write!(f, "DLPack type {code} of {} bits", self.bits),
        };
        write!(f, "{name}{}", self.bits)?;
        if self.lanes != 1 { write!(f, "x{}", self.lanes) } else { Ok(()) }
    }
}

/// The borrowed memory of one array or tensor.
pub struct Memory<'py> {
    argument: String,
    /// Keeps the producer's memory alive.
    _capsule: Bound<'py, PyCapsule>,
    data: NonNull<u8>,
    data_type: DataType,
    shape: Vec<usize>,
    strides: Vec<i64>,
    read_only: bool,
}

impl<'py> Memory<'py> {
    /// Borrows the memory of an object that has `__dlpack__`; `argument` is what errors call it.
    pub fn borrow(argument: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let kwargs = [("max_version", (1, 0))].into_py_dict(py)?;
        let capsule = match object.call_method("__dlpack__", (), Some(&kwargs)) {
            // Producers older than DLPack 1.0 do not know the keyword.
            Err(e) if e.is_instance_of::<PyTypeError>(py) => object.call_method0("__dlpack__")?,
            other => other?,
        };
        let capsule = capsule.cast_into::<PyCapsule>().map_err(PyErr::from)?;
        let (raw, read_only) = if capsule.is_valid_checked(Some(c"dltensor_versioned")) {
            let managed: NonNull<Versioned> =
                capsule.pointer_checked(Some(c"dltensor_versioned"))?.cast();
            // SAFETY: the name promises a DLManagedTensorVersioned, whose first two fields stand in
            // every version.
            let (major, minor) = unsafe { ((*managed.as_ptr()).major, (*managed.as_ptr()).minor) };
            if major != 1 {
                let message =
                    format!("{argument}: DLPack version {major}.{minor} given, 1.x expected");
                return Err(PyBufferError::new_err(message));
            }
            // SAFETY: of major version 1, so it has this layout, and it lives while the capsule does.
            let managed = unsafe { managed.as_ref() };
            (&managed.tensor, managed.flags & READ_ONLY != 0)
        } else {
            let managed: NonNull<RawTensor> = capsule.pointer_checked(Some(c"dltensor"))?.cast();
            // SAFETY: the name promises a DLManagedTensor, which begins with the tensor.
            (unsafe { managed.as_ref() }, false)
        };
        if raw.device.kind != CPU {
            let device = format!("DLPack device {}:{}", raw.device.kind, raw.device.index);
            return Err(error::value(argument, device, "a tensor in CPU memory"));
        }
        let (shape, strides) = layout(raw);
        let empty = shape.contains(&0);
        let data = raw.data.cast::<u8>().wrapping_add(raw.byte_offset as usize);
        let data = match NonNull::new(data) {
            Some(data) if !empty => data,
            // Nothing to point to: producers may give null, which a view must not hold.
            _ if empty => NonNull::<u128>::dangling().cast(),
            _ => return Err(PyBufferError::new_err("it has no memory")),
        };
        Ok(Self {
            argument: argument.to_owned(),
            data_type: raw.dtype,
            _capsule: capsule.clone(),
            data,
            shape,
            strides,
            read_only,
        })
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }

    /// TypeError about the element type.
    pub fn wrong_dtype(&self, expected: impl Display) -> PyErr {
        error::dtype(&self.argument, self.data_type, expected)
    }

    /// Extents of a tensor whose rank is known; `names` is what errors call them.
    pub fn extents<const RANK: usize>(&self, names: &str) -> PyResult<[usize; RANK]> {
        let expected = format_args!("rank {RANK} {names}");
        self.shape[..].try_into().map_err(|_| error::shape(&self.argument, &self.shape, expected))
    }

    /// The memory as the core sees it.
    pub fn view<T: Scalar>(&self) -> PyResult<TensorView<'_, T>> {
        self.check::<T>()?;
        // SAFETY: the producer owns every element that shape and strides reach, in one allocation,
        // for as long as `self` holds the capsule; type and alignment were checked. That no other
        // thread writes to an input during a call is the caller's promise, as with every function
        // of NumPy or PyTorch that releases the interpreter lock.
        let view = unsafe {
            TensorView::from_raw(self.data.as_ptr().cast::<T>(), &self.shape, &self.strides)
        };
        view.map_err(error::python)
    }

    /// The memory to write to; only for arrays made by [`crate::tensor::empty`], which nobody else
    /// has seen yet.
    pub fn view_mut<T: Scalar>(&mut self) -> PyResult<TensorViewMut<'_, T>> {
        self.check::<T>()?;
        if self.read_only {
            return Err(error::value(&self.argument, "a read-only tensor", "a writable one"));
        }
        // SAFETY: as in `view`, and the array was made for this call: nothing else refers to it.
        let view = unsafe {
            TensorViewMut::from_raw(self.data.as_ptr().cast::<T>(), &self.shape, &self.strides)
        };
        view.map_err(error::python)
    }

    /// The elements to write to, row-major; for arrays as in [`Self::view_mut`].
    pub fn as_mut_slice<T: Scalar>(&mut self) -> PyResult<&mut [T]> {
        let Some(len) = self.view_mut::<T>()?.view().as_slice().map(<[T]>::len) else {
            return Err(error::value(&self.argument, "other memory", "contiguous memory"));
        };
        // SAFETY: as in `view_mut`; the elements are contiguous, and `len` many.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().cast(), len) })
    }

    fn check<T: Scalar>(&self) -> PyResult<()> {
        if self.data_type != T::DATA_TYPE {
            return Err(self.wrong_dtype(T::DATA_TYPE));
        }
        if self.shape.is_empty() || self.shape.len() > MAX_RANK {
            let expected = format_args!("rank 1 to {MAX_RANK}");
            return Err(error::shape(&self.argument, &self.shape, expected));
        }
        let align = align_of::<T>();
        if !self.data.as_ptr().addr().is_multiple_of(align) {
            let message = format!(
                "{}: memory at {:p} given, an address divisible by {align} expected",
                self.argument, self.data
            );
            return Err(PyValueError::new_err(message));
        }
        Ok(())
    }
}

/// Shape, and strides in elements, of a tensor.
fn layout(raw: &RawTensor) -> (Vec<usize>, Vec<i64>) {
    let rank = usize::try_from(raw.rank).unwrap_or(0);
    // SAFETY: shape and strides hold one entry per dimension; shape may be null only at rank 0.
    let list = |ptr: *const i64| unsafe { std::slice::from_raw_parts(ptr, rank) }.to_vec();
    if rank == 0 {
        return (vec![], vec![]);
    }
    let shape: Vec<usize> = list(raw.shape).into_iter().map(|n| n.max(0) as usize).collect();
    // An empty tensor's strides mean nothing, and NumPy gives zeros.
    if !raw.strides.is_null() && !shape.contains(&0) {
        return (shape, list(raw.strides));
    }
    let mut strides = vec![1i64; rank];
    for d in (1..rank).rev() {
        strides[d - 1] = strides[d].saturating_mul(shape[d].max(1) as i64);
    }
    (shape, strides)
}
