//! The instruction families: each file decodes its mnemonics and holds their semantics.

pub mod atomic;
pub mod barrier;
pub mod bulk;
pub mod cluster;
pub mod compare;
pub mod control;
pub mod convert;
pub mod copy;
pub mod cp_async;
pub mod float;
pub mod half;
pub mod integer;
pub mod load_store;
pub mod logic;
pub mod matrix;
pub mod mbarrier;
pub mod misc;
pub mod mma;
pub mod moves;
pub mod tensormap;
pub mod warp;
pub mod wgmma;

use crate::ast::Type;
use crate::decode::{Env, Opcode, Result};
use crate::program::{Decoded, Preset};

type Decoder = fn(&mut Opcode<'_>, &Env<'_>) -> Result<Decoded>;

/// The family of a mnemonic's first part.
fn family(root: &str) -> Option<Decoder> {
    Some(match root {
        "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "abs" | "neg"
        | "copysign" => arithmetic,
        "addc" | "subc" | "madc" => integer::with_carry,
        "mul24" | "mad24" => integer::product24,
        "popc" | "clz" | "brev" | "bfind" | "bfe" | "bfi" | "bmsk" | "szext" | "prmt" | "shf"
        | "sad" | "dp4a" | "dp2a" => integer::bits,
        "and" | "or" | "xor" | "not" | "cnot" | "lop3" | "shl" | "shr" => logic::decode,
        "setp" | "set" | "selp" | "slct" => compare::decode,
        "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "tanh" | "sin" | "cos" => float::special,
        "testp" => float::testp,
        "cvt" => convert::decode,
        "mov" | "cvta" | "mapa" => moves::decode,
        "bra" | "ret" | "exit" | "call" | "trap" | "brkpt" | "nanosleep" | "pmevent" => {
            control::decode
        }
        "ld" | "ldu" | "st" | "prefetch" | "prefetchu" | "discard" | "isspacep"
        | "createpolicy" => load_store::decode,
        "bar" | "barrier" => barrier::decode,
        "setmaxnreg" | "griddepcontrol" | "getctarank" => misc::decode,
        "ldmatrix" | "stmatrix" | "movmatrix" => matrix::decode,
        "mma" => mma::decode,
        "tensormap" => tensormap::decode,
        "wgmma" => wgmma::decode,
        "cp" => cp_async::decode,
        "mbarrier" => mbarrier::decode,
        "shfl" | "vote" | "match" | "redux" | "elect" | "activemask" => warp::decode,
        "atom" | "red" | "fence" | "membar" => atomic::decode,
        _ => return None,
    })
}

/// Arithmetic by the type it works on.
fn arithmetic(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let ty = op.ty()?;
    match ty {
        Type::F32 | Type::F64 => float::arithmetic(op, env, ty),
        Type::F16 | Type::Bf16 | Type::F16x2 | Type::Bf16x2 => half::arithmetic(op, env, ty),
        _ => integer::arithmetic(op, env, ty),
    }
}

/// Decodes one instruction.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match family(op.root()) {
        Some(decode) => decode(op, env),
        None => Err(format!("unknown opcode {}", op.root())),
    }
}

/// A special register.
pub enum Special {
    /// Known at the start of a warp.
    Preset(Preset),
    /// The same everywhere.
    Constant(u64),
}

/// A special register by name; the clocks are values of `mov` alone.
pub fn special(name: &str) -> Option<Special> {
    let (stem, dimension) = match name.split_once('.') {
        None => (name, None),
        Some((stem, d)) => (stem, Some(["x", "y", "z"].iter().position(|x| *x == d)? as u8)),
    };
    let preset = match (stem, dimension) {
        ("%tid", Some(d)) => Preset::Tid(d),
        ("%ntid", Some(d)) => Preset::Ntid(d),
        ("%ctaid", Some(d)) => Preset::Ctaid(d),
        ("%nctaid", Some(d)) => Preset::Nctaid(d),
        ("%clusterid", Some(d)) => Preset::Clusterid(d),
        ("%nclusterid", Some(d)) => Preset::Nclusterid(d),
        ("%cluster_ctaid", Some(d)) => Preset::ClusterCtaid(d),
        ("%cluster_nctaid", Some(d)) => Preset::ClusterNctaid(d),
        ("%cluster_ctarank", None) => Preset::ClusterCtarank,
        ("%cluster_nctarank", None) => Preset::ClusterNctarank,
        ("%laneid", None) => Preset::Laneid,
        ("%warpid", None) => Preset::Warpid,
        ("%nwarpid", None) => Preset::Nwarpid,
        ("%lanemask_eq", None) => Preset::Lanemask(0),
        ("%lanemask_le", None) => Preset::Lanemask(1),
        ("%lanemask_lt", None) => Preset::Lanemask(2),
        ("%lanemask_ge", None) => Preset::Lanemask(3),
        ("%lanemask_gt", None) => Preset::Lanemask(4),
        ("%smid", None) => Preset::Smid,
        ("%nsmid", None) => Preset::Nsmid,
        ("%gridid", None) => Preset::Gridid,
        ("%dynamic_smem_size", None) => Preset::DynamicShared,
        ("%total_smem_size", None) => Preset::TotalShared,
        ("WARP_SZ", None) => return Some(Special::Constant(32)),
        ("%is_explicit_cluster", None) => return Some(Special::Constant(0)),
        _ => return None,
    };
    Some(Special::Preset(preset))
}
