//! Decoded kernels: a flat array of instructions, each a closure made by its family.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::arch::Arch;
use crate::ast;
use crate::context::Cx;
use crate::count::Class;
use crate::order::OrderCost;
use crate::registers::{self, Reallocation};

/// Values of one register in the 32 lanes of a warp, in the low bits whatever the type.
pub type Lanes = [u64; 32];

/// What the interpreter does after an instruction, for the lanes that executed it.
pub enum Flow {
    /// On to the next instruction.
    Next,
    /// Branch.
    Jump(u32),
    /// The lanes have ended.
    Exit,
    /// Not done: execute again when something has changed. What the first attempt has done already
    /// stands in [`Cx::note`].
    Wait(Waiting),
    /// Done, but a poll has failed or the thread sleeps: let others run.
    Spin(Waiting),
    /// Reported, and the launch cannot go on.
    Fault,
}

/// What a group of lanes waits for, in the words of a deadlock report.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Waiting {
    /// The other lanes of a collective instruction.
    Lanes(u32),
    /// All other lanes of the warp, at an instruction that all execute together.
    Aligned(u32),
    /// Anything else, described.
    On(String),
    /// Nothing in particular: a thread that sleeps or polls.
    Poll,
}

/// The semantics of one decoded instruction.
pub type Exec = Box<dyn Fn(&mut Cx<'_, '_>) -> Flow + Send + Sync>;

/// What a family returns for an instruction.
pub struct Decoded {
    /// The semantics.
    pub exec: Exec,
    /// The class it is counted under.
    pub class: Class,
}

impl Decoded {
    /// An instruction that always goes on to the next.
    pub fn next(class: Class, exec: impl Fn(&mut Cx<'_, '_>) + Send + Sync + 'static) -> Self {
        Self::flow(class, move |cx| {
            exec(cx);
            Flow::Next
        })
    }

    /// Counts what the order of the instruction costs each time it is done; polls that fail and
    /// waits under way are left out, for how often they repeat is the schedule's.
    pub fn counting(self, cost: OrderCost) -> Self {
        if cost.is_none() {
            return self;
        }
        let Self { exec, class } = self;
        Self::flow(class, move |cx| {
            let flow = exec(cx);
            if matches!(flow, Flow::Next) {
                *cx.gang.counters.order.entry(cx.pc).or_default() += cost;
            }
            flow
        })
    }

    /// An instruction that decides how to go on.
    pub fn flow(
        class: Class,
        exec: impl Fn(&mut Cx<'_, '_>) -> Flow + Send + Sync + 'static,
    ) -> Self {
        Self { exec: Box::new(exec), class }
    }
}

/// A data register read by an instruction, or a constant.
#[derive(Clone, Debug)]
pub enum Src {
    /// Register slot.
    Reg(u32),
    /// The same bits in every lane.
    Imm(Box<Lanes>),
}

impl Src {
    /// A constant.
    pub fn imm(bits: u64) -> Self {
        Self::Imm(Box::new([bits; 32]))
    }

    /// The value of a constant.
    pub fn constant(&self) -> Option<u64> {
        match self {
            Self::Reg(_) => None,
            Self::Imm(lanes) => Some(lanes[0]),
        }
    }
}

/// A data register written by an instruction; None for the sink `_`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Dst(pub Option<u32>);

/// A predicate register written by an instruction; None for the sink or an absent operand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PredDst(pub Option<u32>);

/// A predicate read by an instruction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pred {
    /// Predicate slot, possibly negated.
    Reg {
        /// Slot.
        slot: u32,
        /// Whether the operand is `!p`.
        negated: bool,
    },
    /// The same in every lane.
    Constant(bool),
}

/// A memory operand: base register or constant, plus an offset.
#[derive(Clone, Debug)]
pub struct Address {
    /// What the base names.
    pub base: Src,
    /// Bytes to add.
    pub offset: i64,
    /// State space of a named variable, where the base is one.
    pub symbol: Option<ast::Space>,
}

/// One decoded instruction.
pub struct Instr {
    /// Semantics.
    pub exec: Exec,
    /// Lanes that execute it; None: all.
    pub guard: Option<Pred>,
    /// Class it is counted under.
    pub class: Class,
    /// Mnemonic, as written.
    pub mnemonic: Arc<str>,
    /// Line of the PTX text.
    pub line: u32,
    /// CUDA source line.
    pub source: Option<(u32, u32)>,
}

/// A register whose value stands at the start of a warp.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Preset {
    /// %tid, by dimension.
    Tid(u8),
    /// %ntid.
    Ntid(u8),
    /// %ctaid.
    Ctaid(u8),
    /// %nctaid.
    Nctaid(u8),
    /// %clusterid.
    Clusterid(u8),
    /// %nclusterid.
    Nclusterid(u8),
    /// %cluster_ctaid.
    ClusterCtaid(u8),
    /// %cluster_nctaid.
    ClusterNctaid(u8),
    /// %cluster_ctarank.
    ClusterCtarank,
    /// %cluster_nctarank.
    ClusterNctarank,
    /// %laneid.
    Laneid,
    /// %warpid.
    Warpid,
    /// %nwarpid.
    Nwarpid,
    /// %lanemask_eq, le, lt, ge, gt: 0 to 4.
    Lanemask(u8),
    /// %smid.
    Smid,
    /// %nsmid.
    Nsmid,
    /// %gridid.
    Gridid,
    /// %dynamic_smem_size.
    DynamicShared,
    /// %total_smem_size.
    TotalShared,
    /// Address of static shared variable number n.
    SharedVariable(u32),
    /// Address of the dynamic shared array.
    DynamicArray,
}

/// A kernel parameter.
#[derive(Clone, Debug)]
pub struct Param {
    /// Name in the PTX text.
    pub name: String,
    /// Byte offset in the parameter block.
    pub offset: u32,
    /// Size in bytes.
    pub bytes: u32,
}

/// A static shared or a local variable.
#[derive(Clone, Debug)]
pub struct Variable {
    /// Name in the PTX text.
    pub name: String,
    /// Offset from the first static byte, or in the frame.
    pub offset: u32,
    /// Size in bytes.
    pub bytes: u32,
    /// Alignment the text promises.
    pub align: u32,
}

/// A decoded kernel.
pub struct Kernel {
    /// Name of the entry.
    pub name: String,
    /// Flat program.
    pub instrs: Vec<Instr>,
    /// Number of data register slots.
    pub registers: u32,
    /// Number of predicate slots.
    pub predicates: u32,
    /// Slots set before the first instruction.
    pub presets: BTreeMap<Preset, u32>,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// Static shared variables.
    pub shared: Vec<Variable>,
    /// Bytes of static shared memory.
    pub static_shared: u32,
    /// Alignment the text promises for the dynamic shared array.
    pub dynamic_align: u32,
    /// Local variables and call parameters, by offset; what lies between is a red zone.
    pub locals: Vec<Variable>,
    /// Bytes of local memory per thread.
    pub frame: u32,
    /// What its setmaxnreg ask for; None without.
    pub reallocation: Option<Reallocation>,
    /// Launch directives.
    pub directives: ast::Directives,
    /// Source files by number.
    pub files: BTreeMap<u32, Arc<str>>,
    /// Names of the registers by slot, for messages.
    pub names: Vec<String>,
}

impl Kernel {
    /// Registers of a thread at entry, where the text tells; see [`Reallocation::at_entry`].
    pub fn registers_at_entry(&self, arch: Arch) -> Option<u32> {
        self.reallocation?.at_entry(&self.directives, arch)
    }

    /// The most registers of a thread that the text allows.
    pub fn most_registers(&self, arch: Arch) -> u32 {
        registers::most_registers(&self.directives, arch).unwrap_or(registers::MOST)
    }

    /// CUDA source file and line of an instruction.
    pub fn source(&self, instr: &Instr) -> Option<(Arc<str>, u32)> {
        let (file, line) = instr.source?;
        Some((self.files.get(&file).cloned().unwrap_or_default(), line))
    }
}
