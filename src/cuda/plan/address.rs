//! Addresses that are known only when a plan runs.
//!
//! A plan's parameters hold *symbols* in the place of addresses: an operand and an offset into it,
//! in one 64-bit number. A run replaces them. 0 stays 0: absent.

use bytemuck::Pod;

use super::params::*;
use crate::error::{Error, Result};

/// What the addresses of a run belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operand {
    /// Queries: address of element (0, …, 0), as for every tensor.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output.
    O,
    /// Log-sum-exp.
    Lse,
    /// The local branch.
    ADot,
    /// The memory branch.
    AMem,
    /// Gate logits, f32 `[Hq]`.
    Gate,
    /// Cosines of the rotation.
    Cos,
    /// Sines of the rotation.
    Sin,
    /// Positions in device memory, i64.
    Positions,
    /// Table of sequences in device memory, [`InfiniSequence`] each.
    Sequences,
    /// The state's allocation; see [`StateLayout`](super::StateLayout).
    State,
    /// The plan's workspace.
    Workspace,
    /// Key sums, f32 [B, Hkv, Dk], that are made.
    KeySums,
    /// Key sums that a run finds.
    Before,
    /// A map that is made or applied.
    Map,
    /// The first of two maps or key sums.
    First,
    /// The second of two.
    Second,
    /// Entry of a list of partial results.
    Part(u16),
    /// The log-sum-exp of such an entry.
    PartLse(u16),
    /// Entry of a list of states.
    Source(u16),
}

/// Bits of an offset inside a symbol: more than a device has memory.
const OFFSET_BITS: u32 = 48;

/// Operands without an index, in the order of their numbers from 1 on.
const NAMED: [(Operand, &str); 19] = [
    (Operand::Q, "q"),
    (Operand::K, "k"),
    (Operand::V, "v"),
    (Operand::O, "o"),
    (Operand::Lse, "lse"),
    (Operand::ADot, "a_dot"),
    (Operand::AMem, "a_mem"),
    (Operand::Gate, "gate"),
    (Operand::Cos, "rope.cos"),
    (Operand::Sin, "rope.sin"),
    (Operand::Positions, "positions"),
    (Operand::Sequences, "sequences"),
    (Operand::State, "state"),
    (Operand::Workspace, "workspace"),
    (Operand::KeySums, "key_sums"),
    (Operand::Before, "before"),
    (Operand::Map, "map"),
    (Operand::First, "first"),
    (Operand::Second, "second"),
];

/// Numbers of indexed operands: a kind in the upper two bits, the index below.
const PART: u64 = 1 << 14;
const PART_LSE: u64 = 2 << 14;
const SOURCE: u64 = 3 << 14;

impl Operand {
    /// Most entries of a list.
    pub(crate) const MAX_PARTS: usize = PART as usize;

    fn number(self) -> u64 {
        match self {
            Operand::Part(i) => PART | (u64::from(i) % PART),
            Operand::PartLse(i) => PART_LSE | (u64::from(i) % PART),
            Operand::Source(i) => SOURCE | (u64::from(i) % PART),
            _ => 1 + NAMED.iter().position(|(named, _)| *named == self).unwrap_or(0) as u64,
        }
    }

    /// The symbol of this operand's byte `offset`.
    pub(crate) fn at(self, offset: u64) -> u64 {
        debug_assert!(offset >> OFFSET_BITS == 0);
        self.number() << OFFSET_BITS | offset
    }

    /// Operand and offset of a symbol other than 0.
    fn of(symbol: u64) -> (Operand, u64) {
        let (number, offset) = (symbol >> OFFSET_BITS, symbol & ((1 << OFFSET_BITS) - 1));
        let index = (number % PART) as u16;
        let operand = match number & SOURCE {
            PART => Operand::Part(index),
            PART_LSE => Operand::PartLse(index),
            SOURCE => Operand::Source(index),
            _ => NAMED[(number as usize).clamp(1, NAMED.len()) - 1].0,
        };
        (operand, offset)
    }
}

impl std::fmt::Display for Operand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Operand::Part(i) => write!(f, "a_dot[{i}]"),
            Operand::PartLse(i) => write!(f, "lse[{i}]"),
            Operand::Source(i) => write!(f, "states[{i}]"),
            _ => f.write_str(NAMED[self.number() as usize - 1].1),
        }
    }
}

/// The device addresses of one run.
///
/// ```
/// use infini_attn::cuda::{Addresses, Operand};
/// let addresses = Addresses::new().with(Operand::Q, 0x7000_0000).with(Operand::K, 0x7100_0000);
/// assert_eq!(addresses.get(Operand::Q), 0x7000_0000);
/// assert_eq!(addresses.get(Operand::O), 0);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Addresses(Vec<(Operand, u64)>);

impl Addresses {
    /// No address at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with one more address, or another one in its place.
    pub fn with(mut self, operand: Operand, address: u64) -> Self {
        self.set(operand, address);
        self
    }

    /// Sets an address; a captured run keeps those that it was recorded with.
    pub fn set(&mut self, operand: Operand, address: u64) {
        match self.0.iter_mut().find(|(known, _)| *known == operand) {
            Some((_, known)) => *known = address,
            None => self.0.push((operand, address)),
        }
    }

    /// The address, 0 where none is set.
    pub fn get(&self, operand: Operand) -> u64 {
        self.0.iter().find(|(known, _)| *known == operand).map_or(0, |(_, address)| *address)
    }

    /// The address that a symbol stands for.
    pub(crate) fn resolve(&self, symbol: u64) -> u64 {
        if symbol == 0 {
            return 0;
        }
        let (operand, offset) = Operand::of(symbol);
        self.get(operand).wrapping_add(offset)
    }
}

/// What a plan needs of one operand's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// The operand.
    pub operand: Operand,
    /// Alignment of its address in bytes.
    pub align: u64,
    /// Bytes reached below its address (negative strides).
    pub before: u64,
    /// Bytes reached from its address on.
    pub after: u64,
}

impl Requirement {
    pub(crate) fn check(&self, addresses: &Addresses) -> Result<()> {
        let got = addresses.get(self.operand);
        if got != 0 && got.is_multiple_of(self.align) {
            return Ok(());
        }
        let requirement = format!("a multiple of {} other than 0 expected", self.align);
        Err(Error::Address { argument: self.operand.to_string(), got, requirement })
    }
}

/// Bytes in which symbols are to be replaced: parameters of a launch, or a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    bytes: Vec<u8>,
    /// Where the symbols stand.
    symbols: Vec<usize>,
}

impl Bytes {
    /// Plain data.
    pub fn plain<P: Pod>(data: &[P]) -> Self {
        Self { bytes: bytemuck::cast_slice(data).to_vec(), symbols: Vec::new() }
    }

    /// Structures with their addresses.
    pub fn new<P: Parameters>(data: &[P]) -> Self {
        let mut bytes = Self::plain(data);
        for (i, item) in data.iter().enumerate() {
            let mut item = *item;
            let start = &raw const item as usize;
            item.addresses(&mut |address| {
                let offset = &raw const *address as usize - start;
                if *address != 0 {
                    bytes.symbols.push(i * size_of::<P>() + offset);
                }
            });
        }
        bytes
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes of a run.
    pub fn resolve(&self, addresses: &Addresses) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for &at in &self.symbols {
            let symbol = &mut bytes[at..at + size_of::<u64>()];
            let address = addresses.resolve(bytemuck::pod_read_unaligned(symbol));
            symbol.copy_from_slice(bytemuck::bytes_of(&address));
        }
        bytes
    }
}

/// A structure of kernels/params.h, of which the addresses are known.
pub(crate) trait Parameters: Pod {
    /// Calls `visit` with every address, those of inner structures included.
    fn addresses(&mut self, visit: &mut dyn FnMut(&mut u64));
}

impl Parameters for u64 {
    fn addresses(&mut self, visit: &mut dyn FnMut(&mut u64)) {
        visit(self);
    }
}

/// Structure: its addresses; its structures that hold addresses.
macro_rules! parameters {
    ($($name:ident: $($address:ident)*; $($inner:ident)*.)*) => {
        $(impl Parameters for $name {
            fn addresses(&mut self, visit: &mut dyn FnMut(&mut u64)) {
                let _ = &visit;
                $(visit(&mut self.$address);)*
                $(self.$inner.addresses(visit);)*
            }
        })*

        /// Number of addresses in every structure, by name.
        #[cfg(test)]
        fn counts() -> Vec<(&'static str, usize)> {
            vec![$((stringify!($name), {
                let mut count = 0;
                <$name as bytemuck::Zeroable>::zeroed().addresses(&mut |_| count += 1);
                count
            })),*]
        }
    };
}

parameters! {
    InfiniTensor: data;.
    InfiniRope: cos sin positions;.
    InfiniState: memory normalizer snapshot snapshot_scale open_k open_k_rotated open_v counters
        status;.
    InfiniRun: pieces chains;.
    InfiniSequences: table;.
    InfiniExchange: partials head_tickets sequence_tickets;.
    InfiniCall: gate; q k v o a_dot a_mem lse rope.
    InfiniRotateKeys: status rotated; k rope run.
    InfiniSegmentState: b sums; k v state run.
    InfiniNormaliserScan: sums z start end; run.
    InfiniSegmentTransition: z g g_scale; k state run.
    InfiniMemoryScan: b g g_scale start end snapshot snapshot_scale end_snapshot
        end_snapshot_scale; run.
    InfiniSegmentAttention: rotated snapshot snapshot_scale z; call state run.
    InfiniAppend: rotated; call state run.
    InfiniClearPadding: ; call sequences.
    InfiniSegment: rotated; call state exchange sequences.
    InfiniDecode: ; call state exchange sequences.
    InfiniCommit: ; state exchange sequences.
    InfiniMergePartials: a_dot lse; out out_lse.
    InfiniSum: inputs out;.
    InfiniCompose: a b d c;.
    InfiniSnapshot: memory snapshot snapshot_scale;.
    InfiniTable: to;.
    InfiniCopySlots: pairs; from to.
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses of every structure as the header has them, inner structures included.
    fn header() -> Vec<(String, usize)> {
        let mut counts: Vec<(String, usize)> = Vec::new();
        let text = include_str!("../../../kernels/params.h");
        for block in text.split("\nstruct ").skip(1) {
            let (name, rest) = block.split_once(" {").expect("a body");
            let body = rest.split_once("\n};").expect("an end").0;
            let mut count = 0;
            for line in body.lines().map(str::trim) {
                if line.starts_with("InfiniAddress ") {
                    count += line.split(';').next().unwrap_or("").split(',').count();
                } else if let Some(inner) = line.strip_prefix("struct ") {
                    let inner = inner.split(' ').next().expect("a type");
                    let repeats = if inner == "InfiniSequence" { 0 } else { 1 };
                    let known = counts.iter().find(|(n, _)| n == inner).map_or(0, |(_, c)| *c);
                    count += repeats * known;
                }
            }
            counts.push((name.into(), count));
        }
        counts.retain(|(_, count)| *count > 0);
        counts
    }

    #[test]
    fn every_address_of_the_header_is_known() {
        let mut known: Vec<_> = counts().into_iter().map(|(n, c)| (n.to_owned(), c)).collect();
        let mut expected = header();
        known.sort();
        expected.sort();
        assert_eq!(known, expected);
    }

    #[test]
    fn symbols_name_operand_and_offset() {
        let indexed =
            [Operand::Part(0), Operand::Part(7), Operand::PartLse(16383), Operand::Source(9)];
        for operand in NAMED.iter().map(|(operand, _)| *operand).chain(indexed) {
            for offset in [0, 1, 256, (1 << OFFSET_BITS) - 1] {
                assert_eq!(Operand::of(operand.at(offset)), (operand, offset));
            }
        }
        assert_eq!(Operand::PartLse(3).to_string(), "lse[3]");
        assert_eq!(Operand::Cos.to_string(), "rope.cos");
    }

    #[test]
    fn addresses_replace_symbols_and_nothing_else() {
        let tensor = |data| InfiniTensor { data, batch: -1, token: 1 << 60, head: 3 };
        let both = [tensor(Operand::K.at(512)), tensor(0)];
        let bytes = Bytes::new(&both).resolve(&Addresses::new().with(Operand::K, 0x1_0000));
        let expected = [tensor(0x1_0200), tensor(0)];
        assert_eq!(bytes, bytemuck::cast_slice::<_, u8>(&expected));
    }
}
