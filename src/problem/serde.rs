//! A problem as data (feature `serde`): the fields that a state file stores, checked by the builder when
//! they are read.

use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Serialize, Serializer};

use super::{Denominator, EmptyMemory, Problem, Update};
use crate::dtype::DType;
use crate::error::Error;

/// Fields under the names of [`Problem::fields`].
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Fields {
    heads: usize,
    /// As many as heads if absent.
    kv_heads: Option<usize>,
    key_dim: usize,
    value_dim: usize,
    segment_len: usize,
    update: Update,
    empty_memory: EmptyMemory,
    denominator: Denominator,
    /// Dk^-½ if absent.
    scale: Option<f64>,
    dtype: DType,
}

/// What a builder starts from.
impl Default for Fields {
    fn default() -> Self {
        let start = Problem::builder().problem;
        Fields { kv_heads: None, scale: None, ..start.into() }
    }
}

impl From<Problem> for Fields {
    fn from(p: Problem) -> Self {
        Fields {
            heads: p.heads,
            kv_heads: Some(p.kv_heads),
            key_dim: p.key_dim,
            value_dim: p.value_dim,
            segment_len: p.segment_len,
            update: p.update,
            empty_memory: p.empty_memory,
            denominator: p.denominator,
            scale: Some(p.scale),
            dtype: p.dtype,
        }
    }
}

impl TryFrom<Fields> for Problem {
    type Error = Error;

    fn try_from(f: Fields) -> Result<Self, Error> {
        let builder = Problem::builder().heads(f.heads).kv_heads(f.kv_heads.unwrap_or(f.heads));
        let builder = builder.key_dim(f.key_dim).value_dim(f.value_dim).segment_len(f.segment_len);
        let builder = builder.update(f.update).empty_memory(f.empty_memory);
        let builder = builder.denominator(f.denominator).dtype(f.dtype);
        f.scale.map_or(builder, |scale| builder.scale(scale)).build()
    }
}

/// As their text.
macro_rules! text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    )+};
}

text!(Update, EmptyMemory, Denominator, DType);
