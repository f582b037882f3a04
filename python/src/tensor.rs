//! NumPy arrays and PyTorch tensors as arguments and results. PyTorch is looked for only among the
//! modules the program has imported itself.

use std::fmt::Display;

use infini_attn::TensorView;
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyRuntimeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyModule, PyType};

use crate::dlpack::{Memory, Scalar};
use crate::error;

/// Whose arrays: results are of the inputs' kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    NumPy,
    Torch,
}

impl Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::NumPy => "a NumPy array",
            Kind::Torch => "a PyTorch tensor",
        })
    }
}

/// NumPy, imported once.
pub fn numpy(py: Python<'_>) -> PyResult<&Bound<'_, PyModule>> {
    static NUMPY: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    NUMPY.get_or_try_init(py, || py.import("numpy").map(Bound::unbind)).map(|m| m.bind(py))
}

/// PyTorch, if the program has imported it.
fn torch(py: Python<'_>) -> PyResult<Option<&Bound<'_, PyModule>>> {
    static TORCH: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    if let Some(torch) = TORCH.get(py) {
        return Ok(Some(torch.bind(py)));
    }
    let modules = py.import("sys")?.getattr("modules")?.cast_into::<PyDict>()?;
    match modules.get_item("torch")?.map(Bound::cast_into::<PyModule>) {
        // A module still being imported has no Tensor yet, and so made no tensors either.
        Some(Ok(torch)) if torch.hasattr("Tensor")? => {
            Ok(Some(TORCH.get_or_init(py, || torch.unbind()).bind(py)))
        }
        _ => Ok(None),
    }
}

fn is_numpy(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    static ARRAY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let class = ARRAY.import(object.py(), "numpy", "ndarray")?;
    // A masked array is refused: its mask would be ignored.
    Ok(object.is_exact_instance(class) || object.is_instance(class)? && !object.hasattr("mask")?)
}

fn is_torch(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    match torch(object.py())? {
        Some(torch) => object.is_instance(&torch.getattr(intern!(object.py(), "Tensor"))?),
        None => Ok(false),
    }
}

/// Refuses what must not be read, and returns the kind and the object whose memory to borrow.
fn admit<'py>(argument: &str, object: &Bound<'py, PyAny>) -> PyResult<(Kind, Bound<'py, PyAny>)> {
    if is_numpy(object)? {
        return Ok((Kind::NumPy, object.clone()));
    }
    if !is_torch(object)? {
        let class = object.get_type().fully_qualified_name()?;
        return Err(error::wrong_type(argument, class, "a NumPy array or a PyTorch tensor"));
    }
    let py = object.py();
    let device = object.getattr(intern!(py, "device"))?;
    if device.getattr(intern!(py, "type"))?.extract::<String>()? != "cpu" {
        return Err(error::value(
            argument,
            format!("device {device}"),
            "cpu (the only one built in)",
        ));
    }
    // A lazily negated tensor (the imaginary part of a conjugate) does not hold its values.
    if object.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
        return Err(error::value(
            argument,
            "a tensor with the negative bit",
            "tensor.resolve_neg()",
        ));
    }
    if !object.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
        return Ok((Kind::Torch, object.clone()));
    }
    let enabled = torch(py)?.is_some_and(|t| {
        t.call_method0(intern!(py, "is_grad_enabled")).and_then(|e| e.is_truthy()).unwrap_or(true)
    });
    if enabled {
        return Err(error::value(
            argument,
            "a tensor that requires grad",
            "no gradient (this operator computes none: use torch.no_grad() or tensor.detach())",
        ));
    }
    Ok((Kind::Torch, object.call_method0(intern!(py, "detach"))?))
}

/// The memory of an argument, and its kind.
pub fn borrow<'py>(argument: &str, object: &Bound<'py, PyAny>) -> PyResult<(Kind, Memory<'py>)> {
    let (kind, object) = admit(argument, object)?;
    lend(argument, kind, &object, "f32, f16 or bf16").map(|memory| (kind, memory))
}

/// The memory of what was admitted; where it cannot be shared, `expected` is what errors ask for.
fn lend<'py>(
    argument: &str,
    kind: Kind,
    object: &Bound<'py, PyAny>,
    expected: &str,
) -> PyResult<Memory<'py>> {
    match Memory::borrow(argument, object) {
        // What DLPack cannot describe: the element type, the byte order or the layout. PyTorch's nested
        // tensors say so by RuntimeError.
        Err(e)
            if e.is_instance_of::<PyBufferError>(object.py())
                || e.is_instance_of::<PyRuntimeError>(object.py()) =>
        {
            let reason = e.value(object.py());
            let got = format!("{kind} that cannot be shared ({reason})");
            Err(error::wrong_type(argument, got, expected))
        }
        other => other,
    }
}

/// Refuses an argument of another kind than the argument `like`.
pub fn check_kind(argument: &str, got: Kind, like: &str, kind: Kind) -> PyResult<()> {
    if got != kind {
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
    let kwargs = PyDict::new(py);
    let object = match (kind, torch(py)?) {
        (Kind::Torch, Some(torch)) => {
            kwargs.set_item("dtype", torch.getattr(T::NAME)?)?;
            kwargs.set_item("device", "cpu")?;
            torch.call_method("empty", (shape,), Some(&kwargs))?
        }
        _ => {
            kwargs.set_item("dtype", T::NAME)?;
            numpy(py)?.call_method("empty", (shape,), Some(&kwargs))?
        }
    };
    let memory = Memory::borrow("out", &object)?;
    Ok((object, memory))
}

/// A new NumPy array [shape] that holds `values`, row-major.
pub fn array<'py, T: Scalar>(
    py: Python<'py>,
    shape: &[usize],
    values: &[T],
) -> PyResult<Bound<'py, PyAny>> {
    let (object, mut memory) = empty::<T>(py, Kind::NumPy, shape)?;
    memory.as_mut_slice()?.copy_from_slice(values);
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

/// Integers (a list, an array or a tensor of any integer type), row-major, and their shape.
pub fn integers(argument: &str, object: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, Vec<i64>)> {
    let array = to_numpy(argument, object, "iu", "int64", "integers")?;
    let memory = Memory::borrow(argument, &array)?;
    Ok((memory.shape().to_vec(), elements(memory.view()?)?))
}

/// Integers as another type; one that does not fit it is refused by its index.
pub fn narrow<T: TryFrom<i64>>(
    argument: &str,
    integers: Vec<i64>,
    expected: impl Display,
) -> PyResult<Vec<T>> {
    let mut narrowed = reserved(integers.len())?;
    for (i, n) in integers.into_iter().enumerate() {
        let refused = |_| error::value(&format!("{argument}[{i}]"), n, &expected);
        narrowed.push(T::try_from(n).map_err(refused)?);
    }
    Ok(narrowed)
}

/// Floating-point numbers of any precision [n], as f32.
pub fn floats(argument: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    let array = to_numpy(argument, object, "f", "float32", "floating-point numbers")?;
    let memory = Memory::borrow(argument, &array)?;
    memory.extents::<1>("[n]")?;
    elements(memory.view()?)
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

/// A small argument as a NumPy array of `dtype`, if it is of one of the `kinds` (`dtype.kind`).
fn to_numpy<'py>(
    argument: &str,
    object: &Bound<'py, PyAny>,
    kinds: &str,
    dtype: &str,
    expected: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let py = object.py();
    let mut object = object.clone();
    if is_torch(&object)? {
        let (kind, admitted) = admit(argument, &object)?;
        // Of a tensor whose storage was freed NumPy makes an array of what lies anywhere.
        lend(argument, kind, &admitted, expected)?;
        object = admitted;
        let torch_dtype = object.getattr("dtype")?;
        if kinds == "f" && torch_dtype.getattr("is_floating_point")?.is_truthy()? {
            // NumPy has no bfloat16.
            object = object.call_method0("float")?;
        }
    }
    let array = numpy(py)?
        .call_method1("asarray", (&object,))
        .map_err(|e| not_an_array(argument, &object, e, expected))?;
    let kind: String = array.getattr("dtype")?.getattr("kind")?.extract()?;
    // An empty list has no type of its own.
    if !kinds.contains(&kind) && array.getattr("size")?.extract::<usize>()? > 0 {
        return Err(error::dtype(argument, array.getattr("dtype")?, expected));
    }
    array.call_method1("astype", (dtype,))
}
