//! The one error type of the crate.

use std::fmt::Display;

use crate::dtype::DType;

/// Everything that can be wrong with a call, an argument or a file.
///
/// Every variant names what was refused and carries both the value received and what would have
/// been accepted. A call that returns an error has written nothing: state and outputs keep their
/// bits. Two exceptions: a call that is cancelled may have taken in some tokens
/// ([`Error::Cancelled`]); a CUDA driver that refuses a step after it has taken others leaves outputs
/// half written, and the state's slots are refused from then on ([`Error::Unfinished`]) until they are
/// reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong rank or extents.
    #[error("{argument}: shape {got:?} given, {expected} expected")]
    Shape {
        /// Name of the argument.
        argument: &'static str,
        /// Shape received.
        got: Vec<usize>,
        /// Shape accepted, in words.
        expected: String,
    },
    /// A tensor's element type is not the problem's.
    #[error("{argument}: dtype {got} given, {expected} expected")]
    DType {
        /// Name of the argument.
        argument: &'static str,
        /// Element type received.
        got: DType,
        /// Element type accepted.
        expected: DType,
    },
    /// A tensor's strides cannot be served.
    #[error("{argument}: strides {got:?} (in elements) given, {requirement}")]
    Stride {
        /// Name of the argument.
        argument: &'static str,
        /// Strides received, in elements.
        got: Vec<i64>,
        /// What the strides must satisfy.
        requirement: &'static str,
    },
    /// A buffer or list has the wrong number of elements.
    #[error("{argument}: {got} elements given, {expected} expected")]
    Length {
        /// Name of the argument.
        argument: &'static str,
        /// Number of elements received.
        got: usize,
        /// Number accepted, in words.
        expected: String,
    },
    /// A value or one entry of a list is outside what is accepted.
    #[error("{argument}: {got} given, {expected} expected")]
    Value {
        /// Name of the argument, with the index of the entry where there is one.
        argument: String,
        /// Value received.
        got: String,
        /// What is accepted.
        expected: String,
    },
    /// An address cannot be served.
    #[error("{argument}: address {got:#x} given, {requirement}")]
    Address {
        /// Name of the operand.
        argument: String,
        /// Address received.
        got: u64,
        /// What is accepted.
        requirement: String,
    },
    /// No CUDA kernel is compiled for this value.
    #[error("{argument}: {got} given, the CUDA kernels are compiled for {accepted}")]
    Unsupported {
        /// Name of the argument.
        argument: &'static str,
        /// Value received.
        got: String,
        /// Every value accepted.
        accepted: String,
    },
    /// The state (or file, or map) was made for another problem.
    #[error("state: made for {field} = {got}, the call has {field} = {expected}")]
    Problem {
        /// The first field that differs.
        field: &'static str,
        /// The state's value.
        got: String,
        /// The call's value.
        expected: String,
    },
    /// The device has taken only some steps of a call: what the slot holds is neither the state before
    /// it nor the one after.
    #[error(
        "state: a call was broken off that works on slot {slot}; reset the slot, or go on from a copy"
    )]
    Unfinished {
        /// The slot of the state.
        slot: usize,
    },
    /// Tokens were to be taken back that are in the memory already.
    #[error(
        "tokens: {tokens} given for slot {slot}, at least {least} expected: what is committed cannot be taken back"
    )]
    Committed {
        /// The slot of the state.
        slot: usize,
        /// Tokens the stream was to keep.
        tokens: u64,
        /// Tokens up to the beginning of its open segment.
        least: u64,
    },
    /// A pool has no free slot.
    #[error("pool: all {slots} slots are taken; free one, or reserve more")]
    PoolFull {
        /// Slots of the pool.
        slots: usize,
    },
    /// A handle of a slot that was freed since, or of another pool.
    #[error("slot {slot}: a handle of generation {generation} given, {expected} expected")]
    StaleSlot {
        /// The slot that it names.
        slot: usize,
        /// The generation that it names.
        generation: u64,
        /// What is accepted.
        expected: String,
    },
    /// Rotation was switched on or off inside an open segment.
    #[error(
        "rope: slot {slot} holds an open segment of {open_len} tokens brought {}, this call comes {}; flush first",
        if *.rotated { "with rotation" } else { "without rotation" },
        if *.rotated { "without" } else { "with it" }
    )]
    RotationChanged {
        /// The slot of the state.
        slot: usize,
        /// Tokens in its open segment.
        open_len: usize,
        /// Whether those tokens were rotated.
        rotated: bool,
    },
    /// The operation needs a state without an open segment.
    #[error(
        "{argument}: slot {slot} has {open_len} tokens in its open segment, 0 expected; flush first"
    )]
    OpenSegment {
        /// Name of the argument.
        argument: &'static str,
        /// The slot of the state.
        slot: usize,
        /// Tokens in its open segment.
        open_len: usize,
    },
    /// Two finished delta-rule memories were to be merged; that has no closed form.
    #[error(
        "states: {first} and {second} both hold a finished delta-rule memory (slot {slot}: {first_tokens} and \
         {second_tokens} tokens); only linear memories add, use key_sums, segment_map and compose instead"
    )]
    DeltaMerge {
        /// Index of the first of the two states.
        first: usize,
        /// Index of the second.
        second: usize,
        /// The slot in which both are filled.
        slot: usize,
        /// Tokens committed in the first.
        first_tokens: u64,
        /// Tokens committed in the second.
        second_tokens: u64,
    },
    /// The call was asked to end ([`Inputs::cancel`](crate::Inputs::cancel)). State and outputs are those
    /// of a call with the tokens taken in; what the outputs hold beyond them means nothing.
    #[error("cancelled: {taken:?} tokens per sequence were taken in")]
    Cancelled {
        /// Tokens of each sequence that the state has taken in.
        taken: Vec<usize>,
    },
    /// The threads of rayon's global pool could not be started. Nothing was changed.
    #[error(
        "threads: {reason}; set RAYON_NUM_THREADS, or call inside a pool of your own (ThreadPool::install)"
    )]
    Threads {
        /// What the system says.
        reason: String,
    },
    /// The system has not so much memory. Nothing was changed.
    #[error("{what}: {bytes} B asked for, the system has not so much")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes asked for.
        bytes: u128,
    },
    /// No CUDA device can be used.
    #[error("no usable CUDA device: {reason}")]
    NoDevice {
        /// What is missing: the driver library, the device, or its compute capability.
        reason: String,
    },
    /// The CUDA driver refused something other than a launch.
    #[error("CUDA: {what}: {reason}")]
    Driver {
        /// What was asked of it.
        what: String,
        /// Its answer.
        reason: String,
    },
    /// A kernel could not be launched.
    #[error("CUDA: launch of {kernel} on {grid:?} blocks of {threads} threads ({what}): {reason}")]
    Launch {
        /// Its symbol.
        kernel: &'static str,
        /// Blocks in x, y and z.
        grid: [u32; 3],
        /// Threads per block.
        threads: u32,
        /// The operation and its shapes.
        what: String,
        /// The driver's answer.
        reason: String,
    },
    /// Something that cannot be part of a CUDA graph was asked of a stream that captures one.
    #[error("{what} while the stream captures a graph: {instead}")]
    Capturing {
        /// What was asked.
        what: String,
        /// What to do before the capture begins.
        instead: &'static str,
    },
    /// A kernel met an index that it could not accept: it skipped the sequence, or, for a position outside
    /// the rotation tables, took the token in without rotation.
    #[error("CUDA: the device met {}", status_names(*.bits))]
    Status {
        /// The status word, a sum of `INFINI_STATUS_*`.
        bits: u32,
    },
    /// A state file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A state file (or byte string) is not one of ours, is truncated or is corrupt.
    #[error("{path}: not a usable state: {reason}")]
    Format {
        /// The file, or `<bytes>`.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn value(
        argument: impl Into<String>,
        got: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Value { argument: argument.into(), got: got.to_string(), expected: expected.into() }
    }

    /// `name` is none of those of `T`.
    pub(crate) fn name<T: strum::VariantNames>(argument: &str, name: &str) -> Self {
        let names = T::VARIANTS.join(", ");
        let expected = names.rsplit_once(", ").map(|(most, last)| format!("{most} or {last}"));
        Self::value(argument, name, expected.unwrap_or(names))
    }

    pub(crate) fn out_of_memory(what: impl Display, bytes: u128) -> Self {
        Self::OutOfMemory { what: what.to_string(), bytes }
    }

    pub(crate) fn shape(
        argument: &'static str,
        got: &[usize],
        expected: impl Into<String>,
    ) -> Self {
        Self::Shape { argument, got: got.to_vec(), expected: expected.into() }
    }
}

/// What the bits of a status word mean.
fn status_names(bits: u32) -> String {
    const NAMES: [&str; 4] = [
        "a slot outside the state",
        "a length outside what the call allows",
        "a position outside the rotation tables",
        "rotation changed inside an open segment",
    ];
    let mut names: Vec<String> = (NAMES.iter().enumerate())
        .filter(|(i, _)| bits >> i & 1 == 1)
        .map(|(_, name)| (*name).to_string())
        .collect();
    if bits >> NAMES.len() != 0 {
        names.push(format!("unknown bits {:#x}", bits >> NAMES.len() << NAMES.len()));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_bit_has_a_name() {
        let text = Error::Status { bits: 0b1010 }.to_string();
        assert!(
            text.ends_with(
                "a length outside what the call allows, rotation changed inside an open segment"
            ),
            "{text}"
        );
        assert!(
            Error::Status { bits: 17 }
                .to_string()
                .ends_with("a slot outside the state, unknown bits 0x10")
        );
    }
}
