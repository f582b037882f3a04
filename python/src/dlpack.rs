//! DLPack: the memory of a NumPy array or a PyTorch tensor, borrowed without a copy.
//!
//! A capsule from `__dlpack__` is borrowed, never consumed: it keeps its name, so its own
//! destructor hands the memory back to the producer when [`Memory`], which holds the only reference
//! to it, is dropped. PyTorch hands out the same structure by a table of C functions ([`Exchange`]),
//! in a tenth of the time.
//!
//! The structures are those of `dlpack-ffi`. The crate `dlpark` has more, but consumes capsules, takes
//! `__dlpack__` and the table in an order of its own and brings its own errors.

use std::ffi::c_void;
use std::fmt::Display;
use std::ptr::{NonNull, null_mut};

use dlpack_ffi::{
    DLDataType, DLDeviceType, DLManagedTensor, DLManagedTensorVersioned,
    DLPACK_FLAG_BITMASK_READ_ONLY, DLPackExchangeAPI, DLTensor,
};
use half::{bf16, f16};
use infini_attn::{MAX_RANK, TensorView, TensorViewMut};
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyCapsule};

use crate::error;

/// The major version of the structures that is read here.
const MAJOR: u32 = 1;

/// `DLDataType` of dlpack.h.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

impl From<DLDataType> for DataType {
    fn from(raw: DLDataType) -> Self {
        Self { code: raw.code, bits: raw.bits, lanes: raw.lanes }
    }
}

/// Whether memory of a kind of device is read as the processor's own.
pub fn in_host_memory(device: u32) -> bool {
    let host = [DLDeviceType::kDLCPU, DLDeviceType::kDLCUDAHost, DLDeviceType::kDLROCMHost];
    host.contains(&DLDeviceType(device))
}

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
        // SAFETY: kDLInt is 0, kDLUInt 1, kDLFloat 2, kDLBfloat 4; plain numbers.
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
    i8: "int8", 0, 8;
    i16: "int16", 0, 16;
    i32: "int32", 0, 32;
    i64: "int64", 0, 64;
    u8: "uint8", 1, 8;
    u16: "uint16", 1, 16;
    u32: "uint32", 1, 32;
    u64: "uint64", 1, 64;
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
            6 => return f.write_str("bool"),
            code => return write!(f, "DLPack type {code} of {} bits", self.bits),
        };
        write!(f, "{name}{}", self.bits)?;
        if self.lanes != 1 { write!(f, "x{}", self.lanes) } else { Ok(()) }
    }
}

/// What keeps a producer's memory alive.
#[expect(dead_code, reason = "held for what dropping it does")]
enum Owner<'py> {
    Capsule(Bound<'py, PyCapsule>),
    Tensor(Exported),
}

/// The borrowed memory of one array or tensor.
pub struct Memory<'py> {
    argument: String,
    _owner: Owner<'py>,
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
        let export = intern!(py, "__dlpack__");
        let kwargs = [(intern!(py, "max_version"), (MAJOR, 0))].into_py_dict(py)?;
        let capsule = match object.call_method(export, (), Some(&kwargs)) {
            // Producers older than DLPack 1.0 do not know the keyword.
            Err(e) if e.is_instance_of::<PyTypeError>(py) => object.call_method0(export)?,
            other => other?,
        };
        let capsule = capsule.cast_into::<PyCapsule>().map_err(PyErr::from)?;
        let (raw, read_only) = if capsule.is_valid_checked(Some(c"dltensor_versioned")) {
            let managed = capsule.pointer_checked(Some(c"dltensor_versioned"))?;
            // SAFETY: the name promises a DLManagedTensorVersioned, which lives while the capsule does.
            unsafe { versioned(argument, managed.cast()) }?
        } else {
            let managed: NonNull<DLManagedTensor> =
                capsule.pointer_checked(Some(c"dltensor"))?.cast();
            // SAFETY: the name promises a DLManagedTensor, which lives while the capsule does.
            (unsafe { managed.as_ref() }.dl_tensor, false)
        };
        Self::new(argument, raw, read_only, Owner::Capsule(capsule))
    }

    /// The memory of a tensor of the class that `exchange` belongs to.
    pub fn exchange(
        argument: &str,
        object: &Bound<'py, PyAny>,
        exchange: Exchange,
    ) -> PyResult<Self> {
        let exported = exchange.export(object)?;
        // SAFETY: the structure lives while `exported` does.
        let (raw, read_only) = unsafe { versioned(argument, exported.0) }?;
        Self::new(argument, raw, read_only, Owner::Tensor(exported))
    }

    fn new(argument: &str, raw: DLTensor, read_only: bool, owner: Owner<'py>) -> PyResult<Self> {
        if !in_host_memory(raw.device.device_type.0) {
            let device =
                format!("DLPack device {}:{}", raw.device.device_type.0, raw.device.device_id);
            return Err(error::value(argument, device, "a tensor in CPU memory"));
        }
        let (shape, strides) = layout(&raw);
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
            data_type: raw.dtype.into(),
            _owner: owner,
            data,
            shape,
            strides,
            read_only,
        })
    }

    /// Whether the elements lie at addresses that their type permits.
    pub fn is_aligned(&self) -> bool {
        let bytes = (usize::from(self.data_type.bits) / 8).max(1);
        self.data.as_ptr().addr().is_multiple_of(bytes)
    }

    /// Whether the elements are booleans of a byte each.
    pub fn is_bool(&self) -> bool {
        self.data_type == DataType { code: 6, bits: 8, lanes: 1 }
    }

    /// The same bits as numbers of another type of the same size.
    pub fn reinterpret<T: Scalar>(mut self) -> Self {
        debug_assert_eq!(usize::from(self.data_type.bits), 8 * size_of::<T>());
        self.data_type = T::DATA_TYPE;
        self
    }

    /// A single number as a list of one.
    pub fn listed(mut self) -> Self {
        if self.shape.is_empty() {
            (self.shape, self.strides) = (vec![1], vec![1]);
        }
        self
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

    /// Refuses memory to write to that reaches into the memory of an input.
    pub fn check_apart(&self, input: &Memory<'_>) -> PyResult<()> {
        let ([start, end], [first, last]) = (self.span(), input.span());
        if start < last && first < end {
            let got = format_args!("memory that overlaps that of {}", input.argument);
            return Err(error::value(&self.argument, got, "memory of its own"));
        }
        Ok(())
    }

    /// The first address of an element and the one behind the last.
    fn span(&self) -> [i128; 2] {
        let bytes = i128::from(self.data_type.bits.div_ceil(8)) * i128::from(self.data_type.lanes);
        let start = self.data.as_ptr().addr() as i128;
        if self.shape.contains(&0) {
            return [start; 2];
        }
        let reach = self.shape.iter().zip(&self.strides);
        let reach =
            reach.map(|(&extent, &stride)| (extent as i128 - 1) * i128::from(stride) * bytes);
        let [before, after] = reach.fold([0; 2], |[b, a], r| [b + r.min(0), a + r.max(0)]);
        [start + before, start + after + bytes]
    }

    /// The memory to write to: of an array made by [`crate::tensor::empty`], which nobody else has seen
    /// yet, or of one that the caller gives to be written, apart from all that the call reads.
    pub fn view_mut<T: Scalar>(&mut self) -> PyResult<TensorViewMut<'_, T>> {
        self.check::<T>()?;
        if self.read_only {
            return Err(error::value(&self.argument, "a read-only tensor", "a writable one"));
        }
        // SAFETY: as in `view`; nothing else in this call refers to it, and that no other thread does
        // is the caller's promise, as there.
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

/// A tensor that a producer has handed out by its table.
struct Exported(NonNull<DLManagedTensorVersioned>);

impl Drop for Exported {
    fn drop(&mut self) {
        // SAFETY: the structure was handed over to us, and is given back this once.
        unsafe {
            if let Some(delete) = self.0.as_ref().deleter {
                delete(self.0.as_ptr());
            }
        }
    }
}

type ExportFn = unsafe extern "C" fn(*mut c_void, *mut *mut DLManagedTensorVersioned) -> i32;

/// The function of a class's `__dlpack_c_exchange_api__` that hands out its tensors, which it checks for
/// nothing: neither `requires_grad` nor the negative bit.
#[derive(Clone, Copy)]
pub struct Exchange(ExportFn);

impl Exchange {
    /// That of a class, if it has a table of this version.
    pub fn of(class: &Bound<'_, PyAny>) -> Option<Self> {
        let table =
            class.getattr("__dlpack_c_exchange_api__").ok()?.cast_into::<PyCapsule>().ok()?;
        let table = table.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
        let mut table: *const DLPackExchangeAPI = table.as_ptr().cast();
        // SAFETY: the capsule's name promises the table, or null at the end of the chain of older ones;
        // they live as long as the process, and the header is the same in all versions.
        unsafe {
            while !table.is_null() && (*table).header.version.major != MAJOR {
                table = (*table).header.prev_api.cast();
            }
            // The owning form: no memory then depends on Python's object.
            table.as_ref()?.managed_tensor_from_py_object_no_sync.map(Self)
        }
    }

    fn export(self, object: &Bound<'_, PyAny>) -> PyResult<Exported> {
        let mut managed = null_mut();
        // SAFETY: the caller vouches for the object's class, and this thread is attached.
        let status = unsafe { self.0(object.as_ptr().cast(), &mut managed) };
        match NonNull::new(managed) {
            Some(managed) if status == 0 => Ok(Exported(managed)),
            _ => Err(PyErr::take(object.py())
                .unwrap_or_else(|| PyBufferError::new_err("it cannot be shared"))),
        }
    }
}

/// The tensor in a managed one, and whether it may only be read.
///
/// # Safety
/// `managed` points to a `DLManagedTensorVersioned` of any version.
unsafe fn versioned(
    argument: &str,
    managed: NonNull<DLManagedTensorVersioned>,
) -> PyResult<(DLTensor, bool)> {
    // SAFETY: the first field stands in every version.
    let version = unsafe { (*managed.as_ptr()).version };
    if version.major != MAJOR {
        let (major, minor) = (version.major, version.minor);
        let message = format!("{argument}: DLPack version {major}.{minor} given, 1.x expected");
        return Err(PyBufferError::new_err(message));
    }
    // SAFETY: of this version, so it has this layout.
    let managed = unsafe { managed.as_ref() };
    let read_only = managed.flags & u64::from(DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
    Ok((managed.dl_tensor, read_only))
}

/// Shape, and strides in elements, of a tensor.
fn layout(raw: &DLTensor) -> (Vec<usize>, Vec<i64>) {
    let rank = usize::try_from(raw.ndim).unwrap_or(0);
    // SAFETY: shape and strides hold one entry per dimension; shape may be null only at rank 0.
    let list =
        |ptr: *mut i64| unsafe { std::slice::from_raw_parts(ptr.cast_const(), rank) }.to_vec();
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
