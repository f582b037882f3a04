//! Errors as Python sees them: ValueError, TypeError or OSError that name the argument, what was given
//! and what is accepted; MemoryError that says what for.

use std::convert::Infallible;
use std::fmt::Display;
use std::io::ErrorKind;

use infini_attn::Error;
use pyo3::Borrowed;
use pyo3::exceptions::{
    PyException, PyMemoryError, PyOSError, PyOverflowError, PyTypeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::PyBool;

/// The core's error as an exception.
pub fn python(error: Error) -> PyErr {
    let message = error.to_string();
    // What the core calls otherwise than the Python operator.
    let names = [("gate", "beta"), ("o:", "out:")];
    let renamed = names
        .iter()
        .find_map(|(core, own)| message.strip_prefix(core).map(|rest| format!("{own}{rest}")));
    let message = renamed.unwrap_or(message);
    match error {
        Error::DType { .. } | Error::Problem { field: "dtype", .. } => {
            PyTypeError::new_err(message)
        }
        Error::OutOfMemory { .. } => PyMemoryError::new_err(message),
        Error::Io { .. } => PyOSError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

/// The error of a call about a file, with the file's name as Python was given it.
pub fn file(error: Error, name: Py<PyAny>) -> PyErr {
    let Error::Io { source, .. } = &error else { return python(error) };
    match source.raw_os_error() {
        // Python picks FileNotFoundError, PermissionError, … by the number, which on Windows is the
        // fourth argument and elsewhere the first. It shows the number itself.
        Some(code) => {
            let text = source.to_string();
            let text = text.strip_suffix(&format!(" (os error {code})")).unwrap_or(&text);
            PyOSError::new_err((code, text.to_owned(), name, code))
        }
        // A name with a NUL in it.
        None if source.kind() == ErrorKind::InvalidInput => {
            PyValueError::new_err(error.to_string())
        }
        None => python(error),
    }
}

/// ValueError in the core's words.
pub fn value(argument: &str, got: impl Display, expected: impl Display) -> PyErr {
    PyValueError::new_err(format!("{argument}: {got} given, {expected} expected"))
}

/// TypeError about an argument's type.
pub fn wrong_type(argument: &str, got: impl Display, expected: impl Display) -> PyErr {
    PyTypeError::new_err(format!("{argument}: {got} given, {expected} expected"))
}

/// TypeError about an element type.
pub fn dtype(argument: &str, got: impl Display, expected: impl Display) -> PyErr {
    wrong_type(argument, format_args!("dtype {got}"), expected)
}

/// ValueError about a shape.
pub fn shape(argument: &str, got: &[usize], expected: impl Display) -> PyErr {
    value(argument, format_args!("shape {got:?}"), expected)
}

/// A scalar argument as a Rust value, or an error that names it. True and False are no numbers.
pub fn typed<'a, 'py, T: FromPyObject<'a, 'py>>(
    argument: &str,
    object: &'a Bound<'py, PyAny>,
    expected: &str,
) -> PyResult<T> {
    if object.is_instance_of::<PyBool>() {
        return Err(wrong_type(argument, "bool", expected));
    }
    object.extract().map_err(|e: T::Error| {
        let e: PyErr = e.into();
        if !replaceable(&e, object.py()) {
            return e;
        }
        match (e.is_instance_of::<PyOverflowError>(object.py()), object.repr()) {
            (true, repr) => {
                // Python prints no integer of more than some thousand digits.
                let got = repr.map_or("a huge number".into(), |repr| repr.to_string());
                value(argument, got, format_args!("{expected} of 64 bits"))
            }
            _ => match object.get_type().fully_qualified_name() {
                Ok(class) => wrong_type(argument, class, expected),
                Err(e) => e,
            },
        }
    })
}

/// A flag as given, if it was: only where its name is known can it be refused by it.
pub struct Flag<'py>(Option<Bound<'py, PyAny>>);

impl<'py> FromPyObject<'_, 'py> for Flag<'py> {
    type Error = Infallible;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> Result<Self, Infallible> {
        Ok(Self(Some(object.to_owned())))
    }
}

impl<'py> Flag<'py> {
    /// What a signature says by False or True.
    pub const DEFAULT: Self = Self(None);

    /// A flag that is, or is not, there.
    pub fn of(flag: Option<Bound<'py, PyAny>>) -> Self {
        Self(flag)
    }

    /// What was given, if it was.
    pub fn given(&self) -> Option<&Bound<'py, PyAny>> {
        self.0.as_ref()
    }

    /// True or False, NumPy's as well.
    pub fn or(self, default: bool, argument: &str) -> PyResult<bool> {
        let Some(flag) = self.0 else { return Ok(default) };
        match (flag.extract(), flag.get_type().fully_qualified_name()) {
            (Ok(flag), _) => Ok(flag),
            (Err(_), class) => Err(wrong_type(argument, class?, "True or False")),
        }
    }
}

/// The items of a list or another collection, each taken by `item` with its name. The length that the
/// collection claims only tells it from an iterator, which may have no end: nothing is reserved by it.
pub fn items<'py, T>(
    argument: &str,
    object: &Bound<'py, PyAny>,
    item: impl Fn(&str, &Bound<'py, PyAny>) -> PyResult<T>,
) -> PyResult<Vec<T>> {
    let iterator = object.len().and_then(|_| object.try_iter()).map_err(|e| {
        match (replaceable(&e, object.py()), object.get_type().fully_qualified_name()) {
            (true, Ok(class)) => wrong_type(argument, class, "a list"),
            _ => e,
        }
    })?;
    let mut items = Vec::new();
    for (i, object) in iterator.enumerate() {
        items.push(item(&format!("{argument}[{i}]"), &object?)?);
    }
    Ok(items)
}

/// Whether an error of the argument's own code is one of the argument: an interrupt is not, and must
/// reach the caller as it is.
pub fn replaceable(e: &PyErr, py: Python<'_>) -> bool {
    e.is_instance_of::<PyException>(py)
}
