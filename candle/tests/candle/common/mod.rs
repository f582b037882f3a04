//! The table of cases and the driver of the operator's own tests, with candle's tensors as a backend.
// Some of it is for other backends.
#![allow(dead_code)]

#[path = "../../../../tests/common/backend/host.rs"]
pub mod backend;
#[path = "../../../../tests/common/buffers.rs"]
pub mod buffers;
#[path = "../../../../tests/common/call.rs"]
pub mod call;
pub mod candle;
#[path = "../../../../tests/common/cases.rs"]
pub mod cases;
#[path = "../../../../tests/common/data.rs"]
pub mod data;
#[path = "../../../../tests/common/driver.rs"]
pub mod driver;
#[path = "../../../../tests/common/elements.rs"]
mod elements;
#[path = "../../../../tests/common/metric.rs"]
pub mod metric;
#[path = "../../../../tests/common/model.rs"]
pub mod model;
#[path = "../../../../tests/common/plain.rs"]
pub mod plain;
pub mod random;
#[path = "../../../../tests/common/spans.rs"]
pub mod spans;
#[path = "../../../../tests/common/stream.rs"]
pub mod stream;
#[cfg(feature = "cuda")]
#[path = "../../../../tests/common/tensor_cases.rs"]
pub mod tensor_cases;
#[path = "../../../../tests/common/tolerance.rs"]
pub mod tolerance;

pub use elements::{WithType, bits, narrow, scalar, widen, with_type};
