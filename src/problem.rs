//! What is to be computed: heads, dimensions, segment length and policies, validated once.

#[cfg(feature = "serde")]
mod serde;

use strum::{Display, EnumString, VariantNames};

use crate::dtype::DType;
use crate::error::{Error, Result};

/// How a finished segment is written into the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Display, EnumString, VariantNames)]
#[strum(serialize_all = "lowercase", parse_err_ty = Error, parse_err_fn = unknown_update)]
#[non_exhaustive]
pub enum Update {
    /// M ← M + σ(K)ᵀ V (paper, eq. 8).
    Linear,
    /// M ← M + σ(K)ᵀ (V − σ(K) M / σ(K) z) (paper, eq. 9): only what the memory does not already
    /// answer is written.
    #[default]
    Delta,
}

/// What a query gets while nothing has been committed to the memory. The retrieved value is 0
/// either way; the policies differ in the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Display, EnumString, VariantNames)]
#[strum(serialize_all = "lowercase", parse_err_ty = Error, parse_err_fn = unknown_empty_memory)]
#[non_exhaustive]
pub enum EmptyMemory {
    /// A = (1 − g) · A_dot, the paper's formula with A_mem = 0.
    #[default]
    Gate,
    /// A = A_dot: the gate is bypassed.
    Bypass,
}

/// The denominator of a retrieval, σ(q)·z, in both retrievals (queries, and keys under
/// [`Update::Delta`]).
#[derive(Clone, Copy, Debug, PartialEq, Default)]
#[non_exhaustive]
pub enum Denominator {
    /// σ(q)·z as it is: positive once anything was written. Where every written σ(k) underflowed
    /// the memory is as good as empty and the retrieval is 0.
    #[default]
    Exact,
    /// max(σ(q)·z, ε).
    Clamp(f32),
    /// σ(q)·z + ε.
    Add(f32),
}

impl Denominator {
    /// The denominator of a row whose σ(q)·z is `dot`.
    pub(crate) fn of(self, dot: f64) -> f64 {
        match self {
            Denominator::Exact => dot,
            Denominator::Clamp(eps) => dot.max(eps.into()),
            Denominator::Add(eps) => dot + f64::from(eps),
        }
    }
}

fn unknown_update(name: &str) -> Error {
    Error::name::<Update>("update", name)
}

fn unknown_empty_memory(name: &str) -> Error {
    Error::name::<EmptyMemory>("empty_memory", name)
}

/// Written `exact`, `clamp:1e-10` or `add:1e-6`.
impl std::fmt::Display for Denominator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Denominator::Exact => f.write_str("exact"),
            Denominator::Clamp(eps) => write!(f, "clamp:{eps:e}"),
            Denominator::Add(eps) => write!(f, "add:{eps:e}"),
        }
    }
}

impl std::str::FromStr for Denominator {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let eps = |e: &str| e.parse::<f32>().ok();
        let parsed = match s.split_once(':') {
            None if s == "exact" => Some(Denominator::Exact),
            Some(("clamp", e)) => eps(e).map(Denominator::Clamp),
            Some(("add", e)) => eps(e).map(Denominator::Add),
            _ => None,
        };
        parsed.ok_or_else(|| Error::value("denominator", s, "exact, clamp:EPS or add:EPS"))
    }
}

/// A validated description of one Infini-attention operator. Small and `Copy`; every call takes it.
///
/// ```
/// use infini_attn::{DType, Problem, Update};
/// let problem = Problem::builder()
///     .heads(32)
///     .kv_heads(8)
///     .head_dim(128)
///     .segment_len(2048)
///     .update(Update::Delta)
///     .dtype(DType::BF16)
///     .build()?;
/// assert_eq!(problem.group(), 4);
/// # Ok::<(), infini_attn::Error>(())
/// ```
///
/// With the feature `serde` it is read from data and written to it. Reading makes the checks of
/// [`ProblemBuilder::build`], with its errors; what is absent is as the builder starts, and a field that
/// does not exist is an error. Policies and the element type are their text.
///
#[cfg_attr(feature = "serde", doc = "```")]
#[cfg_attr(not(feature = "serde"), doc = "```ignore")]
/// # use infini_attn::{Denominator, Problem};
/// let json = r#"{
///     "heads": 32,
///     "kv_heads": 8,
///     "key_dim": 128,
///     "value_dim": 128,
///     "segment_len": 2048,
///     "update": "delta",
///     "empty_memory": "gate",
///     "denominator": "clamp:1e-10",
///     "scale": 0.125,
///     "dtype": "bf16"
/// }"#;
/// let problem: Problem = serde_json::from_str(json)?;
/// assert_eq!(problem.denominator(), Denominator::Clamp(1e-10));
/// assert_eq!(serde_json::from_str::<Problem>(&serde_json::to_string(&problem)?)?, problem);
///
/// let error = serde_json::from_str::<Problem>(r#"{"heads": 32, "kv_heads": 7}"#).unwrap_err();
/// assert!(error.to_string().starts_with("kv_heads: 7 given, a divisor of heads = 32 expected"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(::serde::Serialize, ::serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(into = "serde::Fields", try_from = "serde::Fields"))]
pub struct Problem {
    heads: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    segment_len: usize,
    update: Update,
    empty_memory: EmptyMemory,
    denominator: Denominator,
    scale: f64,
    dtype: DType,
}

/// Builds a [`Problem`]; see [`Problem::builder`].
#[derive(Clone, Copy, Debug)]
pub struct ProblemBuilder {
    problem: Problem,
    kv_heads: Option<usize>,
    scale: Option<f64>,
}

/// Largest extent of any dimension.
const MAX_EXTENT: usize = 1 << 24;

/// Most floats that the state of one sequence may hold (4 TiB): keeps every element count in i64.
const MAX_STATE: u128 = 1 << 40;

impl Problem {
    /// Starts from 1 head of dimension 64, N = 2048, delta rule, [`EmptyMemory::Gate`],
    /// [`Denominator::Exact`], scale Dk^-½ and f32.
    pub fn builder() -> ProblemBuilder {
        ProblemBuilder {
            problem: Problem {
                heads: 1,
                kv_heads: 1,
                key_dim: 64,
                value_dim: 64,
                segment_len: 2048,
                update: Update::default(),
                empty_memory: EmptyMemory::default(),
                denominator: Denominator::default(),
                scale: 0.0,
                dtype: DType::F32,
            },
            kv_heads: None,
            scale: None,
        }
    }

    /// Query heads, Hq.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Key/value heads, Hkv; each has one memory.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Query heads per key/value head, Hq / Hkv. Query head h reads KV head h div group.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Channels of a query or key, Dk.
    pub fn key_dim(&self) -> usize {
        self.key_dim
    }

    /// Channels of a value or output, Dv.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Tokens per segment, N.
    pub fn segment_len(&self) -> usize {
        self.segment_len
    }

    /// The memory's update rule.
    pub fn update(&self) -> Update {
        self.update
    }

    /// What a query gets from an empty memory.
    pub fn empty_memory(&self) -> EmptyMemory {
        self.empty_memory
    }

    /// The retrieval's denominator.
    pub fn denominator(&self) -> Denominator {
        self.denominator
    }

    /// Factor on q·k in the local softmax.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Element type of q, k, v and the outputs.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A builder that starts from this problem, to change a field.
    pub fn to_builder(&self) -> ProblemBuilder {
        ProblemBuilder { problem: *self, kv_heads: Some(self.kv_heads), scale: Some(self.scale) }
    }

    /// Field names and values, in order: what a state file stores and two problems are compared by.
    pub(crate) fn fields(&self) -> [(&'static str, String); 10] {
        [
            ("heads", self.heads.to_string()),
            ("kv_heads", self.kv_heads.to_string()),
            ("key_dim", self.key_dim.to_string()),
            ("value_dim", self.value_dim.to_string()),
            ("segment_len", self.segment_len.to_string()),
            ("update", self.update.to_string()),
            ("empty_memory", self.empty_memory.to_string()),
            ("denominator", self.denominator.to_string()),
            ("scale", format!("{:e}", self.scale)),
            ("dtype", self.dtype.to_string()),
        ]
    }

    /// The inverse of [`Self::fields`].
    pub(crate) fn from_fields<'a>(get: impl Fn(&'static str) -> Option<&'a str>) -> Result<Self> {
        fn parse<T: std::str::FromStr>(name: &'static str, text: Option<&str>) -> Result<T> {
            let text = text.ok_or_else(|| Error::value(name, "nothing", "a value"))?;
            text.parse().map_err(|_| Error::value(name, text, "a valid value"))
        }
        Problem::builder()
            .heads(parse("heads", get("heads"))?)
            .kv_heads(parse("kv_heads", get("kv_heads"))?)
            .key_dim(parse("key_dim", get("key_dim"))?)
            .value_dim(parse("value_dim", get("value_dim"))?)
            .segment_len(parse("segment_len", get("segment_len"))?)
            .update(parse("update", get("update"))?)
            .empty_memory(parse("empty_memory", get("empty_memory"))?)
            .denominator(parse("denominator", get("denominator"))?)
            .scale(parse("scale", get("scale"))?)
            .dtype(parse("dtype", get("dtype"))?)
            .build()
    }

    /// Element type, heads and dimensions, for titles.
    #[cfg(any(feature = "cuda", feature = "tracing"))]
    pub(crate) fn shapes(&self) -> String {
        format!(
            "{}, Hq {}, Hkv {}, Dk {}, Dv {}, N {}, {}",
            self.dtype(),
            self.heads(),
            self.kv_heads(),
            self.key_dim(),
            self.value_dim(),
            self.segment_len(),
            self.update()
        )
    }

    /// An error naming the first field in which `state` (the problem of a state or file) differs.
    ///
    /// # Errors
    /// [`Error::Problem`].
    pub fn check_same(&self, state: &Problem) -> Result<()> {
        if self == state {
            return Ok(());
        }
        for ((field, expected), (_, got)) in self.fields().into_iter().zip(state.fields()) {
            if got != expected {
                return Err(Error::Problem { field, got, expected });
            }
        }
        Ok(())
    }
}

/// Every field, `heads=8,kv_heads=2,…`: equal problems have equal text.
impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (name, value)) in self.fields().iter().enumerate() {
            write!(f, "{}{name}={value}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// The inverse of the text that `Display` gives.
///
/// ```
/// # use infini_attn::Problem;
/// let problem = Problem::builder().heads(8).kv_heads(2).head_dim(64).build()?;
/// assert_eq!(problem.to_string().parse::<Problem>()?, problem);
/// # Ok::<(), infini_attn::Error>(())
/// ```
impl std::str::FromStr for Problem {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let value =
            |name| text.split(',').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        Self::from_fields(value)
    }
}

impl ProblemBuilder {
    /// Query heads, Hq (default 1).
    pub fn heads(mut self, heads: usize) -> Self {
        self.problem.heads = heads;
        self
    }

    /// Key/value heads, Hkv; divides Hq (default Hq).
    pub fn kv_heads(mut self, kv_heads: usize) -> Self {
        self.kv_heads = Some(kv_heads);
        self
    }

    /// Sets Dk and Dv together.
    pub fn head_dim(self, dim: usize) -> Self {
        self.key_dim(dim).value_dim(dim)
    }

    /// Channels of a query or key, Dk (default 64).
    pub fn key_dim(mut self, dim: usize) -> Self {
        self.problem.key_dim = dim;
        self
    }

    /// Channels of a value, Dv (default 64).
    pub fn value_dim(mut self, dim: usize) -> Self {
        self.problem.value_dim = dim;
        self
    }

    /// Tokens per segment, N (default 2048).
    pub fn segment_len(mut self, tokens: usize) -> Self {
        self.problem.segment_len = tokens;
        self
    }

    /// The memory's update rule (default delta).
    pub fn update(mut self, update: Update) -> Self {
        self.problem.update = update;
        self
    }

    /// What a query gets from an empty memory (default [`EmptyMemory::Gate`]).
    pub fn empty_memory(mut self, policy: EmptyMemory) -> Self {
        self.problem.empty_memory = policy;
        self
    }

    /// The retrieval's denominator (default [`Denominator::Exact`]).
    pub fn denominator(mut self, policy: Denominator) -> Self {
        self.problem.denominator = policy;
        self
    }

    /// Factor on q·k in the local softmax, inside f32's range (default Dk^-½).
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Element type of q, k, v and the outputs (default f32).
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.problem.dtype = dtype;
        self
    }

    /// Checks everything and returns the problem.
    ///
    /// # Errors
    /// [`Error::Value`] naming the field: an extent of 0 or above 2^24, Hkv that does not divide
    /// Hq, a state of more than 2^40 floats per sequence, a scale that is not finite or beyond f32, an ε
    /// that is not positive and finite.
    pub fn build(self) -> Result<Problem> {
        let mut p = self.problem;
        p.kv_heads = self.kv_heads.unwrap_or(p.heads);
        for (field, value) in [
            ("heads", p.heads),
            ("kv_heads", p.kv_heads),
            ("key_dim", p.key_dim),
            ("value_dim", p.value_dim),
            ("segment_len", p.segment_len),
        ] {
            if value == 0 || value > MAX_EXTENT {
                return Err(Error::value(field, value, format!("1 to {MAX_EXTENT}")));
            }
        }
        if !p.heads.is_multiple_of(p.kv_heads) {
            let expected = format!("a divisor of heads = {}", p.heads);
            return Err(Error::value("kv_heads", p.kv_heads, expected));
        }
        let [heads, dk, dv, n] =
            [p.kv_heads, p.key_dim, p.value_dim, p.segment_len].map(|x| x as u128);
        let floats = heads * (dk * dv + dk + n * (2 * dk + dv));
        if floats > MAX_STATE {
            let expected = format!("at most {MAX_STATE} (kv_heads · (Dk Dv + Dk + N (2 Dk + Dv)))");
            return Err(Error::value("floats of state per sequence", floats, expected));
        }
        p.scale = self.scale.unwrap_or_else(|| (p.key_dim as f64).powf(-0.5));
        // Every backend multiplies in f32.
        if !(p.scale as f32).is_finite() {
            let expected = format!("a finite f32, at most {:e} either way", f32::MAX);
            return Err(Error::value("scale", p.scale, expected));
        }
        if let Denominator::Clamp(eps) | Denominator::Add(eps) = p.denominator
            && !(eps > 0.0 && eps.is_finite())
        {
            return Err(Error::value("denominator", p.denominator, "a positive, finite epsilon"));
        }
        Ok(p)
    }
}
