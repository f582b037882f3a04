//! The problem: heads, dimensions, segment length and policies.

use std::str::FromStr;

use infini_attn::{DType, Denominator, Error, ProblemBuilder};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString, PyTuple};

use crate::error::{self, Flag};

/// What is to be computed: heads, dimensions, segment length and policies, validated once.
///
/// Parameters
/// ----------
/// heads, kv_heads : int
///     Query heads Hq and key/value heads Hkv (default Hq); query head h reads key/value head
///     h // (Hq // Hkv).
/// key_dim, value_dim : int
///     Channels Dk of a query or key and Dv (default Dk) of a value.
/// segment_len : int
///     Tokens per segment, N.
/// update : "delta" or "linear"
///     How a finished segment is written into the memory.
/// scale : float
///     Factor on q·k in the local softmax, Dk ** -0.5 by default.
/// empty_memory : "gate" or "bypass"
///     Output while nothing is in the memory: (1 - g) * A_dot, or A_dot.
/// denominator : "exact", ("clamp", eps) or ("add", eps)
///     Denominator of a retrieval.
/// dtype : "f32", "f16" or "bf16"
///     Element type of q, k, v and the outputs; the state is always float32.
#[pyclass(frozen, eq, module = "infini_attn")]
#[derive(PartialEq)]
pub struct Problem(pub infini_attn::Problem);

/// The policies of a call as given: None where the state's value or the default holds.
pub struct Policies<'a, 'py> {
    pub segment_len: Option<&'a Bound<'py, PyAny>>,
    pub update: Option<&'a Bound<'py, PyAny>>,
    pub scale: Option<&'a Bound<'py, PyAny>>,
    pub empty_memory: Option<&'a Bound<'py, PyAny>>,
    pub denominator: Option<&'a Bound<'py, PyAny>>,
}

impl Policies<'_, '_> {
    /// The problem that `builder` makes with these policies, the extents Hq, Hkv, Dk and Dv, and an
    /// element type.
    pub fn problem(
        &self,
        builder: ProblemBuilder,
        [heads, kv_heads, key_dim, value_dim]: [usize; 4],
        dtype: DType,
    ) -> PyResult<infini_attn::Problem> {
        let builder = builder.heads(heads).kv_heads(kv_heads).key_dim(key_dim).value_dim(value_dim);
        let mut builder = builder.dtype(dtype);
        if let Some(n) = self.segment_len {
            builder = builder.segment_len(extent("segment_len", n)?);
        }
        if let Some(name) = self.update {
            builder = builder.update(parse("update", name)?);
        }
        if let Some(scale) = self.scale {
            builder = builder.scale(error::typed("scale", scale, "a number")?);
        }
        if let Some(name) = self.empty_memory {
            builder = builder.empty_memory(parse("empty_memory", name)?);
        }
        if let Some(policy) = self.denominator {
            builder = builder.denominator(denominator(policy)?);
        }
        builder.build().map_err(error::python)
    }
}

/// An extent; what is too large the builder refuses.
pub fn extent(argument: &str, n: &Bound<'_, PyAny>) -> PyResult<usize> {
    let n: i64 = error::typed(argument, n, "an integer")?;
    usize::try_from(n).map_err(|_| error::value(argument, n, "at least 1"))
}

/// An element type by its name, f32 by default.
pub fn element_type(name: Option<&Bound<'_, PyAny>>) -> PyResult<DType> {
    name.map_or(Ok(DType::F32), |name| parse("dtype", name))
}

/// A policy or element type by its name.
fn parse<T>(argument: &str, name: &Bound<'_, PyAny>) -> PyResult<T>
where
    T: FromStr<Err = infini_attn::Error>,
{
    let name: Bound<'_, PyString> = error::typed(argument, name, "a string")?;
    // Lossy: half a surrogate pair is in no name.
    match name.to_string_lossy().parse() {
        Ok(value) => Ok(value),
        // As Python writes it: an empty string would look like none.
        Err(Error::Value { expected, .. }) => Err(error::value(argument, name.repr()?, expected)),
        Err(e) => Err(error::python(e)),
    }
}

fn denominator(policy: &Bound<'_, PyAny>) -> PyResult<Denominator> {
    const EXPECTED: &str = r#""exact", ("clamp", eps) or ("add", eps)"#;
    if policy.extract::<&str>().is_ok_and(|name| name == "exact") {
        return Ok(Denominator::Exact);
    }
    let pair: Option<Bound<'_, PyTuple>> = match policy.cast::<PyList>() {
        Ok(list) => Some(list.to_tuple()),
        Err(_) => policy.cast::<PyTuple>().ok().cloned(),
    };
    if let Some((name, eps)) =
        pair.and_then(|pair| pair.extract::<(String, Bound<'_, PyAny>)>().ok())
    {
        let eps = || error::typed::<f32>("denominator", &eps, "a number as eps");
        match name.as_str() {
            "clamp" => return Ok(Denominator::Clamp(eps()?)),
            "add" => return Ok(Denominator::Add(eps()?)),
            _ => {}
        }
    }
    Err(error::value("denominator", policy.repr()?, EXPECTED))
}

#[pymethods]
impl Problem {
    #[new]
    #[pyo3(signature = (*, heads, key_dim, kv_heads = None, value_dim = None, segment_len = None, update = None, scale = None, empty_memory = None, denominator = None, dtype = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        heads: &Bound<'_, PyAny>,
        key_dim: &Bound<'_, PyAny>,
        kv_heads: Option<&Bound<'_, PyAny>>,
        value_dim: Option<&Bound<'_, PyAny>>,
        segment_len: Option<&Bound<'_, PyAny>>,
        update: Option<&Bound<'_, PyAny>>,
        scale: Option<&Bound<'_, PyAny>>,
        empty_memory: Option<&Bound<'_, PyAny>>,
        denominator: Option<&Bound<'_, PyAny>>,
        dtype: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let policies = Policies { segment_len, update, scale, empty_memory, denominator };
        let extents = [
            extent("heads", heads)?,
            extent("kv_heads", kv_heads.unwrap_or(heads))?,
            extent("key_dim", key_dim)?,
            extent("value_dim", value_dim.unwrap_or(key_dim))?,
        ];
        let builder = infini_attn::Problem::builder();
        policies.problem(builder, extents, element_type(dtype)?).map(Self)
    }

    /// Query heads, Hq.
    #[getter]
    fn heads(&self) -> usize {
        self.0.heads()
    }

    /// Key/value heads, Hkv.
    #[getter]
    fn kv_heads(&self) -> usize {
        self.0.kv_heads()
    }

    /// Channels of a query or key, Dk.
    #[getter]
    fn key_dim(&self) -> usize {
        self.0.key_dim()
    }

    /// Channels of a value or output, Dv.
    #[getter]
    fn value_dim(&self) -> usize {
        self.0.value_dim()
    }

    /// Tokens per segment, N.
    #[getter]
    fn segment_len(&self) -> usize {
        self.0.segment_len()
    }

    /// "delta" or "linear".
    #[getter]
    fn update(&self) -> String {
        self.0.update().to_string()
    }

    /// Factor on q·k in the local softmax.
    #[getter]
    fn scale(&self) -> f64 {
        self.0.scale()
    }

    /// "gate" or "bypass".
    #[getter]
    fn empty_memory(&self) -> String {
        self.0.empty_memory().to_string()
    }

    /// "exact", ("clamp", eps) or ("add", eps).
    #[getter]
    fn denominator<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // By way of text, so that what was given as 1e-10 does not come back as f32's 1.00000001e-10.
        let python = |eps: f32| eps.to_string().parse::<f64>().unwrap_or(eps.into());
        match self.0.denominator() {
            Denominator::Clamp(eps) => Ok(("clamp", python(eps)).into_pyobject(py)?.into_any()),
            Denominator::Add(eps) => Ok(("add", python(eps)).into_pyobject(py)?.into_any()),
            exact => Ok(PyString::new(py, &exact.to_string()).into_any()),
        }
    }

    /// "f32", "f16" or "bf16".
    #[getter]
    fn dtype(&self) -> String {
        self.0.dtype().to_string()
    }

    /// Bytes of a State of that many sequences, before it is made; rotation=True with the rotated keys
    /// that calls with rope add to it.
    #[pyo3(
        signature = (sequences = None, *, rotation = Flag::DEFAULT),
        text_signature = "($self, sequences=None, *, rotation=False)"
    )]
    fn state_bytes(
        &self,
        sequences: Option<&Bound<'_, PyAny>>,
        rotation: Flag<'_>,
    ) -> PyResult<u64> {
        let rotation = rotation.or(false, "rotation")?;
        let sequences = sequences.map_or(Ok(1), |n| extent("sequences", n))?;
        self.0.state_bytes(sequences, rotation).map_err(error::python)
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        self.fields(py)?.hash()
    }

    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let make = py.import("infini_attn._core")?.getattr("_problem_from_fields")?;
        Ok((make, self.fields(py)?))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let p = &self.0;
        let denominator = self.denominator(py)?.repr()?;
        Ok(format!(
            "Problem(heads={}, kv_heads={}, key_dim={}, value_dim={}, segment_len={}, update='{}', \
             scale={}, empty_memory='{}', denominator={denominator}, dtype='{}')",
            p.heads(),
            p.kv_heads(),
            p.key_dim(),
            p.value_dim(),
            p.segment_len(),
            p.update(),
            p.scale(),
            p.empty_memory(),
            p.dtype()
        ))
    }
}

impl Problem {
    /// What [`_problem_from_fields`] takes.
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let p = &self.0;
        (
            p.heads(),
            p.kv_heads(),
            p.key_dim(),
            p.value_dim(),
            p.segment_len(),
            self.update(),
            p.scale(),
            self.empty_memory(),
            self.denominator(py)?,
            self.dtype(),
        )
            .into_pyobject(py)
    }
}

/// What pickle calls.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn _problem_from_fields(
    heads: &Bound<'_, PyAny>,
    kv_heads: &Bound<'_, PyAny>,
    key_dim: &Bound<'_, PyAny>,
    value_dim: &Bound<'_, PyAny>,
    segment_len: &Bound<'_, PyAny>,
    update: &Bound<'_, PyAny>,
    scale: &Bound<'_, PyAny>,
    empty_memory: &Bound<'_, PyAny>,
    denominator: &Bound<'_, PyAny>,
    dtype: &Bound<'_, PyAny>,
) -> PyResult<Problem> {
    Problem::new(
        heads,
        key_dim,
        Some(kv_heads),
        Some(value_dim),
        Some(segment_len),
        Some(update),
        Some(scale),
        Some(empty_memory),
        Some(denominator),
        Some(dtype),
    )
}

/// A problem of its text.
pub fn parsed(text: &str) -> PyResult<infini_attn::Problem> {
    text.parse().map_err(error::python)
}

/// A problem as text, which operators of PyTorch can take.
#[pyfunction]
pub fn _problem_text(problem: &Problem) -> String {
    problem.0.to_string()
}

/// The inverse of `_problem_text`.
#[pyfunction]
pub fn _problem_from_text(text: &str) -> PyResult<Problem> {
    parsed(text).map(Problem)
}

/// The problem of a call, as text: of tensors with these extents and this element type, the policies
/// given, and for the rest those of a state's problem or the defaults.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn _call_problem(
    base: Option<&str>,
    extents: [usize; 4],
    dtype: &Bound<'_, PyAny>,
    segment_len: Option<&Bound<'_, PyAny>>,
    update: Option<&Bound<'_, PyAny>>,
    scale: Option<&Bound<'_, PyAny>>,
    empty_memory: Option<&Bound<'_, PyAny>>,
    denominator: Option<&Bound<'_, PyAny>>,
) -> PyResult<String> {
    let policies = Policies { segment_len, update, scale, empty_memory, denominator };
    let base = base.map(parsed).transpose()?;
    let builder = base.map_or_else(infini_attn::Problem::builder, |p| p.to_builder());
    let problem = policies.problem(builder, extents, element_type(Some(dtype))?)?;
    base.map_or(Ok(()), |base| problem.check_same(&base)).map_err(error::python)?;
    Ok(problem.to_string())
}
