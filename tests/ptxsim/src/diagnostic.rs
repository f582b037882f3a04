//! What is wrong with a kernel, and where.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// Distinct findings kept of a launch; the rest is only counted.
const MOST_FINDINGS: usize = 100;

/// What is wrong.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An access outside every allocation, or a write to constant memory.
    OutOfBounds,
    /// An address that is no multiple of the access.
    Misaligned,
    /// A register read before it was written.
    UninitialisedRegister,
    /// Memory read before it was written.
    UninitialisedMemory,
    /// Two accesses without order between them, at least one a write.
    Race,
    /// A write to memory an asynchronous operation still reads.
    PendingRead,
    /// An access to memory an asynchronous operation still writes.
    PendingWrite,
    /// An access in the async proxy after one in the generic proxy, without a proxy fence.
    MissingProxyFence,
    /// A wgmma whose registers were written since the last wgmma.fence.
    MissingWgmmaFence,
    /// A register of a wgmma that has not been waited for.
    AccumulatorInFlight,
    /// Misuse of an mbarrier.
    Mbarrier,
    /// Lanes apart at an instruction that needs them together.
    Divergence,
    /// Misuse of a named barrier or of the cluster barrier.
    BarrierMismatch,
    /// Nothing can go on, or nothing ends.
    Deadlock,
    /// An action of an early launch that has not waited for the launch before it.
    MissingGridWait,
    /// A limit of the architecture.
    Limit,
    /// Schedules that leave different results.
    ScheduleDependent,
    /// The trap instruction.
    Trap,
    /// An operand the instruction does not allow.
    InvalidOperand,
    /// The same operation by several lanes of one instruction, of which one would do.
    Repeated,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The same names as in the JSON form.
        let mut name = String::new();
        for c in format!("{self:?}").chars() {
            if c.is_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(c.to_ascii_lowercase());
        }
        f.pad(&name)
    }
}

/// Where a lane stands.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Location {
    /// Line of the PTX text, from 1; 0 for what no instruction has caused.
    pub ptx_line: u32,
    /// File and line of the CUDA source, where the text tells.
    pub source: Option<(String, u32)>,
    /// Coordinates of the block.
    pub block: [u32; 3],
    /// Warp in its block.
    pub warp: u32,
    /// Lane in its warp.
    pub lane: u32,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((file, line)) = &self.source {
            write!(f, "{file}:{line} ")?;
        }
        let [x, y, z] = self.block;
        let Self { ptx_line, warp, lane, .. } = self;
        write!(f, "(PTX line {ptx_line}), block ({x}, {y}, {z}), warp {warp}, lane {lane}")
    }
}

/// A place in memory.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Place {
    /// State space.
    pub space: String,
    /// Buffer or variable.
    pub buffer: String,
    /// Bytes from its start; negative or beyond its end when the place is outside.
    pub offset: i64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{:+}", self.space, self.buffer, self.offset)
    }
}

/// One finding.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Diagnostic {
    /// What is wrong.
    pub kind: Kind,
    /// The same in words.
    pub message: String,
    /// Where.
    pub at: Location,
    /// The other side of a race.
    pub other: Option<Location>,
    /// The memory concerned.
    pub address: Option<Place>,
    /// How often it was found at the same instructions.
    pub repeated: u64,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.message)?;
        // Line 0: found between launches, at no instruction.
        if self.at.ptx_line > 0 {
            write!(f, "\n  at {}", self.at)?;
        }
        if let Some(address) = &self.address {
            write!(f, "\n  address: {address}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "\n  the other access: {other}")?;
        }
        if self.repeated > 1 {
            write!(f, "\n  found {} times", self.repeated)?;
        }
        Ok(())
    }
}

/// Findings, one for each kind and pair of instructions.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    found: BTreeMap<(u32, Option<u32>, Kind), Diagnostic>,
    /// Findings beyond the most that are kept.
    dropped: u64,
}

impl Findings {
    /// Adds a finding at the instruction `pc`, against that at `other`.
    pub fn add(&mut self, pc: u32, other: Option<u32>, diagnostic: Diagnostic) {
        let room = self.found.len() < MOST_FINDINGS;
        match self.found.get_mut(&(pc, other, diagnostic.kind)) {
            Some(first) => first.repeated += diagnostic.repeated,
            None if room => {
                self.found.insert((pc, other, diagnostic.kind), diagnostic);
            }
            None => self.dropped += diagnostic.repeated,
        }
    }

    /// Adds those of another part of the same launch, or of another launch of the same kernel.
    pub fn merge(&mut self, other: Self) {
        for ((pc, at, _), diagnostic) in other.found {
            self.add(pc, at, diagnostic);
        }
        self.dropped += other.dropped;
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The findings, by instruction.
    pub fn iter(&self) -> impl Iterator<Item = &Diagnostic> {
        self.found.values()
    }

    /// Findings that were only counted.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}
