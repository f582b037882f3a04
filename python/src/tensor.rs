//! Arrays as arguments and results: NumPy's, PyTorch's, and others that come by DLPack.

use std::fmt::Display;

use half::{bf16, f16};
use infini_attn::TensorView;
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyRuntimeError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyInt, PyList, PyModule, PyString, PyType};

use crate::dlpack::{Memory, Scalar, in_host_memory};
use crate::{error, torch};

/// Whose arrays: results are PyTorch's where the inputs are, otherwise NumPy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    NumPy,
    Torch,
    Other,
}

impl Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::NumPy => "a NumPy array",
            Kind::Torch => "a PyTorch tensor",
            Kind::Other => "an array by DLPack",
        })
    }
}

/// NumPy, imported once.
pub fn numpy(py: Python<'_>) -> PyResult<&Bound<'_, PyModule>> {
    static NUMPY: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    NUMPY.get_or_try_init(py, || py.import("numpy").map(Bound::unbind)).map(|m| m.bind(py))
}

/// Whose array an object is; None for what is no array. A masked array, whose mask would be ignored, is
/// refused.
fn kind(argument: &str, object: &Bound<'_, PyAny>) -> PyResult<Option<Kind>> {
    static ARRAY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let py = object.py();
    let array = ARRAY.import(py, "numpy", "ndarray")?;
    if object.is_exact_instance(array) {
        return Ok(Some(Kind::NumPy));
    }
    if let Some(torch) = torch::loaded(py)?
        && (torch.is_plain(object) || torch.is_tensor(object)?)
    {
        return Ok(Some(Kind::Torch));
    }
    if object.is_instance(array)? {
        if object.hasattr("mask")? {
            let class = object.get_type().fully_qualified_name()?;
            return Err(error::wrong_type(argument, class, "an array without a mask"));
        }
        return Ok(Some(Kind::NumPy));
    }
    let class = object.get_type();
    let by_dlpack = class.hasattr(intern!(py, "__dlpack__"))?
        && class.hasattr(intern!(py, "__dlpack_device__"))?;
    Ok(by_dlpack.then_some(Kind::Other))
}

/// What operands may hold, as errors say it.
const ELEMENTS: &str = "f32, f16 or bf16";

/// The memory of an argument, and its kind.
pub fn borrow<'py>(argument: &str, object: &Bound<'py, PyAny>) -> PyResult<(Kind, Memory<'py>)> {
    match kind(argument, object)? {
        Some(kind) => Ok((kind, lend(argument, kind, object, ELEMENTS)?)),
        None => {
            let class = object.get_type().fully_qualified_name()?;
            Err(error::wrong_type(argument, class, "a NumPy array or a PyTorch tensor"))
        }
    }
}

/// The memory of an array; `expected` is the element types that errors ask for.
fn lend<'py>(
    argument: &str,
    kind: Kind,
    object: &Bound<'py, PyAny>,
    expected: &str,
) -> PyResult<Memory<'py>> {
    let py = object.py();
    let shared = match (kind, torch::loaded(py)?) {
        (Kind::Torch, Some(torch)) => {
            let tensor = torch.admit(argument, object)?;
            match torch.exchange {
                Some(exchange) if torch.is_plain(&tensor) => {
                    Memory::exchange(argument, &tensor, exchange)
                }
                _ => Memory::borrow(argument, &tensor),
            }
        }
        (Kind::Other, _) => {
            check_device(argument, object)?;
            Memory::borrow(argument, object)
        }
        _ if is_bfloat16(object)? => lend_bfloat16(argument, object),
        _ => Memory::borrow(argument, object),
    };
    // What DLPack cannot describe: an element type, a byte order, a layout. PyTorch says so by
    // RuntimeError as well.
    let Err(e) = shared else { return shared };
    if !e.is_instance_of::<PyBufferError>(py) && !e.is_instance_of::<PyRuntimeError>(py) {
        return Err(e);
    }
    Err(match (kind, torch::loaded(py)?) {
        (Kind::Torch, Some(torch)) => torch.why_not(argument, object, &e, expected)?,
        (Kind::NumPy, _) => why_not(argument, object, &e, expected)?,
        _ => {
            let got = format!("{kind} that cannot be shared ({})", e.value(py));
            error::wrong_type(argument, got, expected)
        }
    })
}

/// Why the memory of a NumPy array cannot be had, `e` being what NumPy says.
fn why_not(argument: &str, array: &Bound<'_, PyAny>, e: &PyErr, expected: &str) -> PyResult<PyErr> {
    let size: i64 = array.getattr("itemsize")?.extract()?;
    let strides = array.getattr("strides")?;
    if size > 0 && strides.extract::<Vec<i64>>()?.iter().any(|bytes| bytes % size != 0) {
        let expected = format!("multiples of the {size} bytes of an element");
        return Ok(error::value(argument, format_args!("strides {strides} in bytes"), expected));
    }
    let dtype = array.getattr("dtype")?;
    Ok(error::dtype(argument, format_args!("{dtype} ({})", e.value(array.py())), expected))
}

/// Refuses an array of another library that lies in a device's memory, before it is handed out.
fn check_device(argument: &str, object: &Bound<'_, PyAny>) -> PyResult<()> {
    let device = object.call_method0(intern!(object.py(), "__dlpack_device__"))?;
    match device.extract::<(u32, i32)>() {
        Ok((kind, _)) if in_host_memory(kind) => Ok(()),
        _ => Err(error::value(argument, format_args!("DLPack device {device}"), "CPU memory")),
    }
}

/// The type bfloat16 that the package `ml_dtypes` adds to NumPy, which has none.
fn bfloat16(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static BFLOAT16: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let find = || {
        let ml_dtypes = py.import("ml_dtypes").map_err(|e| {
            PyTypeError::new_err(format!("bfloat16 in NumPy needs the package ml_dtypes ({e})"))
        })?;
        numpy(py)?.call_method1("dtype", (ml_dtypes.getattr("bfloat16")?,)).map(Bound::unbind)
    };
    BFLOAT16.get_or_try_init(py, find).map(|dtype| dtype.bind(py))
}

/// Whether a NumPy array is of that type.
fn is_bfloat16(array: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = array.py();
    // Types that NumPy does not have itself are of no kind.
    let dtype = array.getattr(intern!(py, "dtype"))?;
    let num: i64 = dtype.getattr(intern!(py, "num"))?.extract()?;
    const FIRST_USER_TYPE: i64 = 256;
    Ok(num >= FIRST_USER_TYPE && bfloat16(py).is_ok_and(|own| dtype.eq(own).unwrap_or(false)))
}

fn lend_bfloat16<'py>(argument: &str, array: &Bound<'py, PyAny>) -> PyResult<Memory<'py>> {
    let bits = array.call_method1("view", ("uint16",))?;
    Memory::borrow(argument, &bits).map(Memory::reinterpret::<bf16>)
}

/// Refuses an argument whose results would be of another kind than the argument `like`'s.
pub fn check_kind(argument: &str, got: Kind, like: &str, kind: Kind) -> PyResult<()> {
    if (got == Kind::Torch) != (kind == Kind::Torch) {
        return Err(error::wrong_type(argument, got, format_args!("{kind} as {like} is")));
    }
    Ok(())
}

/// A new array of a kind, contiguous, its elements not yet set; and its memory.
pub fn empty<'py, T: Scalar>(
    py: Python<'py>,
    kind: Kind,
    shape: &[usize],
) -> PyResult<(Bound<'py, PyAny>, Memory<'py>)> {
    if let (Kind::Torch, Some(torch)) = (kind, torch::loaded(py)?) {
        let tensor = torch.empty::<T>(py, shape)?;
        let memory = lend("out", kind, &tensor, ELEMENTS)?;
        return Ok((tensor, memory));
    }
    let dtype = match T::DATA_TYPE == bf16::DATA_TYPE {
        true => bfloat16(py)?.clone(),
        false => PyString::intern(py, T::NAME).into_any(),
    };
    let array = numpy(py)?.call_method1(intern!(py, "empty"), (shape, dtype))?;
    let memory = lend("out", Kind::NumPy, &array, ELEMENTS)?;
    Ok((array, memory))
}

/// A new NumPy array [shape] that holds `values`, row-major.
pub fn array<'py, T: Scalar + Send + Sync>(
    py: Python<'py>,
    shape: &[usize],
    values: &[T],
) -> PyResult<Bound<'py, PyAny>> {
    let (object, mut memory) = empty::<T>(py, Kind::NumPy, shape)?;
    let slots = memory.as_mut_slice()?;
    py.detach(|| slots.copy_from_slice(values));
    Ok(object)
}

/// A new NumPy array, a copy of a view.
pub fn copy<'py>(py: Python<'py>, view: TensorView<'_, f32>) -> PyResult<Bound<'py, PyAny>> {
    match view.as_slice() {
        Some(elements) => array(py, view.shape(), elements),
        None => array(py, view.shape(), &elements(view)?),
    }
}

/// A new NumPy array, int64 [n], of counts.
pub fn counts<'py>(
    py: Python<'py>,
    counts: impl ExactSizeIterator<Item = u64>,
) -> PyResult<Bound<'py, PyAny>> {
    let (object, mut memory) = empty::<i64>(py, Kind::NumPy, &[counts.len()])?;
    let slots = memory.as_mut_slice()?.iter_mut();
    slots.zip(counts).for_each(|(slot, n)| *slot = n as i64);
    Ok(object)
}

/// The elements of a view, row-major.
pub fn elements<T: Copy>(view: TensorView<'_, T>) -> PyResult<Vec<T>> {
    if let Some(slice) = view.as_slice() {
        return collect(slice.iter().copied());
    }
    let shape = view.shape();
    let mut index = vec![0; shape.len()];
    let count = shape.iter().try_fold(1usize, |count, &extent| count.checked_mul(extent));
    collect((0..count.unwrap_or(usize::MAX)).map(|_| {
        let element = view.at(&index);
        for (i, &extent) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < extent {
                break;
            }
            *i = 0;
        }
        element
    }))
}

/// A list, or MemoryError where memory does not hold it.
pub fn collect<T>(items: impl ExactSizeIterator<Item = T>) -> PyResult<Vec<T>> {
    let mut list = reserved(items.len())?;
    list.extend(items);
    Ok(list)
}

/// An empty list with room for so many items.
fn reserved<T>(len: usize) -> PyResult<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(len).map_err(|_| {
        let bytes = len as u128 * size_of::<T>() as u128;
        PyMemoryError::new_err(format!(
            "a copy of an argument: {bytes} B asked for, the system has not so much"
        ))
    })?;
    Ok(list)
}

/// The elements of a memory, each converted, if it is of one of the types.
macro_rules! read {
    ($memory:expr, $expected:expr, $convert:expr, $($type:ty)+) => {
        match $memory.data_type() {
            $(<$type>::DATA_TYPE => {
                let numbers = elements($memory.view::<$type>()?)?;
                collect(numbers.into_iter().map(|x| $convert(x)))
            })+
            _ => Err($memory.wrong_dtype($expected)),
        }
    };
}

/// Integers (one, a list, or an array of any integer type), row-major, and their shape.
pub fn integers(argument: &str, object: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, Vec<i128>)> {
    const EXPECTED: &str = "integers";
    let (shape, memory) = match numbers(argument, object, "iu", EXPECTED) {
        Ok(numbers) => numbers,
        // To NumPy [-1, 2 ** 63] is a list of floats.
        Err(e) => return python_integers(object).ok_or(e),
    };
    let Some(memory) = memory else { return Ok((shape, vec![])) };
    let integers = read!(memory, EXPECTED, i128::from, i64 i32 i16 i8 u64 u32 u16 u8)?;
    Ok((shape, integers))
}

/// A list of Python's own integers.
fn python_integers(object: &Bound<'_, PyAny>) -> Option<(Vec<usize>, Vec<i128>)> {
    let list = object.cast::<PyList>().ok()?;
    let own = list.iter().all(|item| item.is_exact_instance_of::<PyInt>());
    let integers: Vec<i128> = own.then(|| list.extract().ok())??;
    Some((vec![integers.len()], integers))
}

/// Integers as another type; one that does not fit it is refused by its index.
pub fn narrow<T: TryFrom<i128>>(
    argument: &str,
    integers: Vec<i128>,
    expected: impl Display,
) -> PyResult<Vec<T>> {
    let mut narrowed = reserved(integers.len())?;
    for (i, n) in integers.into_iter().enumerate() {
        let refused = |_| error::value(&format!("{argument}[{i}]"), n, &expected);
        narrowed.push(T::try_from(n).map_err(refused)?);
    }
    Ok(narrowed)
}

/// A number of any type.
trait Number {
    /// The nearest f32, infinite beyond its range.
    fn rounded(self) -> f32;
    /// The nearest f64.
    fn wide(self) -> f64;
}

macro_rules! number {
    ($($type:ty)+) => {$(
        impl Number for $type {
            fn rounded(self) -> f32 {
                self as f32
            }

            fn wide(self) -> f64 {
                self as f64
            }
        }
    )+};
}

number!(f32 f64 i64 i32 i16 i8 u64 u32 u16 u8);

macro_rules! half_number {
    ($($type:ty)+) => {$(
        impl Number for $type {
            fn rounded(self) -> f32 {
                self.to_f32()
            }

            fn wide(self) -> f64 {
                self.to_f64()
            }
        }
    )+};
}

half_number!(f16 bf16);

/// Numbers (one, a list, or an array of any floating-point or integer type) as f32, row-major, and
/// their shape.
pub fn floats(argument: &str, object: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, Vec<f32>)> {
    let (shape, memory) = numbers(argument, object, "fiu", NUMBERS)?;
    let floats = memory.map_or(Ok(vec![]), |memory| as_f32(&memory))?;
    Ok((shape, floats))
}

const NUMBERS: &str = "numbers";

/// The elements of a memory of numbers, row-major.
pub fn as_f32(memory: &Memory<'_>) -> PyResult<Vec<f32>> {
    read!(
        memory, NUMBERS, Number::rounded, f32 bf16 f16 f64 i64 i32 i16 i8 u64 u32 u16 u8
    )
}

/// Zeros and ones (lists, or an array of booleans or of any floating-point or integer type), row-major,
/// and their shape.
pub fn zeros_and_ones(
    argument: &str,
    object: &Bound<'_, PyAny>,
) -> PyResult<(Vec<usize>, Vec<bool>)> {
    const EXPECTED: &str = "zeros and ones";
    let (shape, memory) = numbers(argument, object, "biuf", EXPECTED)?;
    let Some(memory) = memory else { return Ok((shape, vec![])) };
    let memory = if memory.is_bool() { memory.reinterpret::<u8>() } else { memory };
    let all: Vec<f64> = read!(
        memory, EXPECTED, Number::wide, i64 u8 f32 f64 bf16 f16 i32 i16 i8 u64 u32 u16
    )?;
    if let Some(i) = all.iter().position(|&x| x != 0.0 && x != 1.0) {
        let (mut index, mut rest) = (vec![], i);
        for extent in shape.iter().rev() {
            index.insert(0, rest % extent);
            rest /= extent;
        }
        return Err(error::value(&format!("{argument}{index:?}"), all[i], "0 or 1"));
    }
    Ok((shape, collect(all.into_iter().map(|x| x == 1.0))?))
}

/// The shape of a small argument and its memory, None where it has no elements (an empty list has no
/// type of its own). What DLPack does not describe comes as a copy, if NumPy says that it is of one of
/// the `kinds` (`dtype.kind`).
fn numbers<'py>(
    argument: &str,
    object: &Bound<'py, PyAny>,
    kinds: &str,
    expected: &str,
) -> PyResult<(Vec<usize>, Option<Memory<'py>>)> {
    let memory = match kind(argument, object)? {
        None => copied(argument, object, kinds, expected)?,
        Some(Kind::NumPy) if !is_bfloat16(object)? => match Memory::borrow(argument, object) {
            Ok(memory) if memory.is_aligned() => memory,
            Err(e) if !e.is_instance_of::<PyBufferError>(object.py()) => return Err(e),
            _ => copied(argument, object, kinds, expected)?,
        },
        Some(kind) => lend(argument, kind, object, expected)?,
    };
    let shape = memory.shape().to_vec();
    let empty = shape.contains(&0);
    Ok((shape, (!empty).then(|| memory.listed())))
}

/// What is no array, or one that DLPack does not describe, as a copy.
fn copied<'py>(
    argument: &str,
    object: &Bound<'py, PyAny>,
    kinds: &str,
    expected: &str,
) -> PyResult<Memory<'py>> {
    let array = numpy(object.py())?
        .call_method1("asarray", (object,))
        .map_err(|e| not_an_array(argument, object, e, expected))?;
    let dtype = array.getattr("dtype")?;
    let kind: String = dtype.getattr("kind")?.extract()?;
    if !kinds.contains(&kind) && array.getattr("size")?.extract::<usize>()? > 0 {
        return Err(error::dtype(argument, dtype, expected));
    }
    let widest = match &*kind {
        "i" => "int64",
        "u" => "uint64",
        _ => "float64",
    };
    Memory::borrow(argument, &array.call_method1("astype", (widest,))?)
}

/// Why an argument is no array, `e` being what NumPy says.
fn not_an_array(argument: &str, object: &Bound<'_, PyAny>, e: PyErr, expected: &str) -> PyErr {
    let py = object.py();
    if e.is_instance_of::<PyMemoryError>(py) {
        return PyMemoryError::new_err(format!("{argument}: no memory for a copy as an array"));
    }
    match (error::replaceable(&e, py), object.get_type().fully_qualified_name()) {
        (true, Ok(class)) => error::wrong_type(argument, format_args!("{class} ({e})"), expected),
        _ => e,
    }
}
