//! What a PTX text says, without any meaning: the parser's result, the decoder's input.
//!
//! Names are kept as written. Scopes stay nested ([`Item::Block`]), because inline assembly
//! declares the same registers and labels again and again.
use std::{collections::BTreeMap, fmt, str::FromStr};

/// A place in the PTX text, counted from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pos {
    /// Line.
    pub line: u32,
    /// Column, in characters.
    pub column: u32,
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Why a text is not PTX that this crate understands, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pos}: {message}")]
pub struct ParseError {
    /// Where the offending token starts.
    pub pos: Pos,
    /// What was found and what was expected.
    pub message: String,
}

/// A whole PTX file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// `.version`: major and minor.
    pub version: (u32, u32),
    /// `.target`, as written: `sm_90a`, or several names joined by `, `.
    pub target: String,
    /// `.address_size`: 32 or 64 (32 where the directive is missing, as the language says).
    pub address_size: u32,
    /// `.file`: names of the source files by the index that [`Loc`] uses.
    pub files: BTreeMap<u32, String>,
    /// Variables at module scope.
    pub variables: Vec<Variable>,
    /// Functions and kernels, in the order of the text; a name may be declared before it is
    /// defined.
    pub functions: Vec<Function>,
}

/// A kernel (`.entry`) or a function (`.func`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Name.
    pub name: String,
    /// Whether it is a kernel.
    pub entry: bool,
    /// Whether it is `.extern`.
    pub external: bool,
    /// Return parameters of a `.func`.
    pub returns: Vec<Variable>,
    /// Parameters.
    pub params: Vec<Variable>,
    /// The statements; `None` for a declaration.
    pub body: Option<Vec<Item>>,
    /// Performance directives.
    pub directives: Directives,
    /// Where the name stands.
    pub pos: Pos,
}

/// What a kernel promises or demands of its launch. A missing dimension counts as 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directives {
    /// `.maxntid`
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`
    pub required_threads: Option<[u32; 3]>,
    /// `.minnctapersm`
    pub min_blocks: Option<u32>,
    /// `.maxnreg`
    pub max_registers: Option<u32>,
    /// `.reqnctapercluster`
    pub cluster: Option<[u32; 3]>,
    /// `.maxclusterrank`
    pub max_cluster: Option<u32>,
    /// `.explicitcluster`
    pub explicit_cluster: bool,
}

impl Directives {
    /// Threads of the largest block that is allowed.
    pub fn threads(&self) -> Option<u32> {
        let dims = self.required_threads.or(self.max_threads)?;
        Some(dims.iter().fold(1, |n: u32, d| n.saturating_mul(*d)))
    }
}

/// State space of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// `.reg`
    Reg,
    /// `.param`
    Param,
    /// `.local`
    Local,
    /// `.shared`
    Shared,
    /// `.global`
    Global,
    /// `.const`
    Const,
}

/// A declared register, parameter or array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// State space.
    pub space: Space,
    /// `.align`, in bytes, where it is given: a power of two.
    pub align: Option<u32>,
    /// Element type.
    pub ty: Type,
    /// Elements of a vector: 1 (scalar), 2 or 4.
    pub vector: u32,
    /// Name; of a range the part before `<`.
    pub name: String,
    /// `Some(5)` for `%r<5>`, which declares `%r0` to `%r4`.
    pub range: Option<u32>,
    /// Array dimensions, outermost first: empty for a scalar, `None` for `[]`.
    pub dims: Vec<Option<u64>>,
    /// Initial elements from the first on; those not named are zero.
    pub init: Vec<Init>,
    /// Whether it is `.extern`.
    pub external: bool,
    /// Where the name stands.
    pub pos: Pos,
}

/// One element of an initialiser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// The bits of the element, already in its type.
    Bits(u64),
    /// The address of a variable or a function.
    Address {
        /// Whose address.
        symbol: String,
        /// Bytes added to it.
        offset: i64,
    },
}

/// Fundamental types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // each is the type that PTX writes in lower case
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

/// Every type with its name and its size in bytes.
const TYPES: [(Type, &str, u32); 20] = [
    (Type::Pred, "pred", 1),
    (Type::B8, "b8", 1),
    (Type::B16, "b16", 2),
    (Type::B32, "b32", 4),
    (Type::B64, "b64", 8),
    (Type::B128, "b128", 16),
    (Type::U8, "u8", 1),
    (Type::U16, "u16", 2),
    (Type::U32, "u32", 4),
    (Type::U64, "u64", 8),
    (Type::S8, "s8", 1),
    (Type::S16, "s16", 2),
    (Type::S32, "s32", 4),
    (Type::S64, "s64", 8),
    (Type::F16, "f16", 2),
    (Type::F16x2, "f16x2", 4),
    (Type::Bf16, "bf16", 2),
    (Type::Bf16x2, "bf16x2", 4),
    (Type::F32, "f32", 4),
    (Type::F64, "f64", 8),
];

impl Type {
    /// Size in bytes; a predicate counts as one.
    pub fn size(self) -> u32 {
        TYPES[self as usize].2
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(TYPES[*self as usize].1)
    }
}

/// The name of a type that this crate does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown type `{0}`")]
pub struct UnknownType(pub String);

impl FromStr for Type {
    type Err = UnknownType;

    /// Reads the name without its dot: `b32`.
    fn from_str(name: &str) -> Result<Self, UnknownType> {
        let found = TYPES.iter().find(|entry| entry.1 == name);
        found.map(|entry| entry.0).ok_or_else(|| UnknownType(name.to_owned()))
    }
}

/// A statement of a function body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// `name:`
    Label {
        /// Name.
        name: String,
        /// Where it stands.
        pos: Pos,
    },
    /// A declaration.
    Variable(Variable),
    /// An instruction.
    Instr(Instr),
    /// `{ … }`: a scope of its own for registers, variables and labels.
    Block(Vec<Item>),
    /// `.loc`: the source position of the instructions that follow.
    Loc(Loc),
}

/// A source position. For inlined code it is the position inside the inlined function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Loc {
    /// Index in [`Module::files`].
    pub file: u32,
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

/// `@p` or `@!p`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The predicate register.
    pub predicate: String,
    /// Whether it is negated.
    pub negated: bool,
}

/// An instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instr {
    /// The predicate it is executed under.
    pub guard: Option<Guard>,
    /// The opcode up to its first dot: `ld`.
    pub root: String,
    /// The rest of the opcode, cut at the dots: `global`, `v4`, `f32`. A name with `::` stays
    /// whole.
    pub mods: Vec<String>,
    /// Operands, in the order of the text.
    pub operands: Vec<Operand>,
    /// Where the opcode stands.
    pub pos: Pos,
}

/// An operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operand {
    /// A register, a label, a symbol, or a special register with its suffix (`%tid.x`); also an
    /// element of a vector register (`v.x`).
    Name(String),
    /// `sym+8`: the address of a variable, moved by some bytes.
    Sum(String, i64),
    /// `!p`
    Not(String),
    /// `d|p`; either may be `_`.
    Pair(String, String),
    /// `_`
    Sink,
    /// An integer literal of any sign, as two's complement bits.
    Int(u64),
    /// `0f…`, as bits.
    F32(u32),
    /// `0d…` or a decimal fraction, as bits.
    F64(u64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `(a, b)` of a call.
    List(Vec<Operand>),
    /// `[r+4]`, `[sym-8]`, `[1024]`, `[map, {c0, c1}]`.
    Address {
        /// What the address starts from.
        base: Base,
        /// Bytes added to it.
        offset: i64,
        /// Coordinates of a tensor copy.
        coordinates: Option<Vec<Operand>>,
    },
}

/// What an address starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// A register or a symbol.
    Name(String),
    /// A number.
    Absolute(u64),
}
