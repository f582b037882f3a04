//! The operator, the module and the model on candle's tensors.

mod common;

mod checkpoint;
mod gradients;
mod model;
mod operator;
mod refusals;
mod table;
