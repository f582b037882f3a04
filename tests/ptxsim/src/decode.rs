//! From the parsed text to a flat program: operands become slots, mnemonics closures.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::ast::{self, Base, Operand, Pos, Space, Type};
use crate::ops;
use crate::order::OrderCost;
use crate::program::{Address, Decoded, Dst, Instr, Kernel, Pred, PredDst, Preset, Src};
use crate::registers::Reallocation;
use crate::scope::{Flat, Symbol};

/// An instruction the simulator does not know, or that makes no sense.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{pos}: {message}")]
pub struct DecodeError {
    /// Where.
    pub pos: Pos,
    /// What is wrong.
    pub message: String,
}

/// Result of a decoding step; the caller adds the position.
pub type Result<T, E = String> = std::result::Result<T, E>;

/// Decodes one kernel of a module.
pub fn kernel(
    module: &ast::Module,
    function: &ast::Function,
    addresses: &BTreeMap<String, u64>,
) -> Result<Kernel, DecodeError> {
    let flat = Flat::new(module, function, addresses)?;
    let shared = RefCell::new(Slots { names: flat.register_names.clone(), ..Slots::default() });
    let mut instrs = Vec::with_capacity(flat.instrs.len());
    for placed in &flat.instrs {
        let i = placed.instr;
        let env = Env { flat: &flat, scope: placed.scope, slots: &shared };
        let mnemonic = mnemonic(i);
        let decode = || -> Result<Instr> {
            let guard = i.guard.as_ref().map(|g| env.predicate(&g.predicate, g.negated));
            let guard = guard.transpose()?;
            let mut op = Opcode::new(i);
            let decoded = ops::decode(&mut op, &env)?;
            op.finish()?;
            let Decoded { exec, class } = decoded.counting(OrderCost::of(&i.root, &i.mods));
            let (line, source) = (i.pos.line, placed.source);
            Ok(Instr { exec, guard, class, mnemonic: mnemonic.as_str().into(), line, source })
        };
        instrs.push(decode().map_err(|e| DecodeError::new(i.pos, format!("{mnemonic}: {e}")))?);
    }
    let slots = shared.into_inner();
    Ok(Kernel {
        name: function.name.clone(),
        instrs,
        registers: slots.names.len() as u32,
        predicates: flat.predicates,
        presets: slots.presets,
        params: flat.params,
        shared: flat.shared,
        static_shared: flat.static_shared,
        dynamic_align: flat.dynamic_align,
        locals: flat.locals,
        frame: flat.frame,
        reallocation: Reallocation::of(flat.instrs.iter().map(|placed| placed.instr)),
        directives: function.directives.clone(),
        files: module.files.iter().map(|(i, name)| (*i, name.as_str().into())).collect(),
        names: slots.names,
    })
}

fn mnemonic(i: &ast::Instr) -> String {
    std::iter::once(i.root.as_str())
        .chain(i.mods.iter().map(String::as_str))
        .collect::<Vec<_>>()
        .join(".")
}

#[derive(Default)]
struct Slots {
    names: Vec<String>,
    presets: BTreeMap<Preset, u32>,
}

/// Resolves the operands of one instruction.
pub struct Env<'a> {
    flat: &'a Flat<'a>,
    scope: usize,
    slots: &'a RefCell<Slots>,
}

impl Env<'_> {
    /// The slot of a preset register.
    pub fn preset(&self, preset: Preset) -> Src {
        let mut slots = self.slots.borrow_mut();
        let next = slots.names.len() as u32;
        let slot = *slots.presets.entry(preset).or_insert(next);
        if slot == next {
            slots.names.push(format!("{preset:?}"));
        }
        Src::Reg(slot)
    }

    fn lookup(&self, name: &str) -> Option<Symbol> {
        self.flat.lookup(self.scope, name)
    }

    /// A data register written with a value of type `ty`.
    pub fn dst(&self, o: &Operand, ty: Type) -> Result<Dst> {
        match o {
            Operand::Sink => Ok(Dst(None)),
            Operand::Name(name) if name == "_" => Ok(Dst(None)),
            Operand::Name(name) => match self.lookup(name) {
                Some(Symbol::Register { slot, ty: declared }) if fits(declared, ty) => {
                    Ok(Dst(Some(slot)))
                }
                Some(Symbol::Register { ty: declared, .. }) => {
                    Err(format!("{name} is declared .{declared}, too narrow for .{ty}"))
                }
                _ => Err(format!("{name} is no register")),
            },
            _ => Err("the destination is no register".into()),
        }
    }

    /// Bytes of the register an operand names.
    pub fn width(&self, o: &Operand) -> Result<u32> {
        match o {
            Operand::Name(name) => match self.lookup(name) {
                Some(Symbol::Register { ty, .. }) => Ok(ty.size()),
                _ => Err(format!("{name} is no register")),
            },
            _ => Ok(8),
        }
    }

    /// Registers of a vector, or of a single operand.
    pub fn dsts(&self, o: &Operand, ty: Type) -> Result<Vec<Dst>> {
        match o {
            Operand::Vector(v) => v.iter().map(|o| self.dst(o, ty)).collect(),
            o => Ok(vec![self.dst(o, ty)?]),
        }
    }

    /// A predicate destination.
    pub fn pred_dst(&self, o: &Operand) -> Result<PredDst> {
        match o {
            Operand::Sink => Ok(PredDst(None)),
            Operand::Name(name) => self.pred_dst_named(name),
            _ => Err("the destination is no predicate".into()),
        }
    }

    fn pred_dst_named(&self, name: &str) -> Result<PredDst> {
        match (name, self.lookup(name)) {
            ("_", _) => Ok(PredDst(None)),
            (_, Some(Symbol::Predicate(slot))) => Ok(PredDst(Some(slot))),
            _ => Err(format!("{name} is no predicate")),
        }
    }

    /// `d|p`, or a lone `d`.
    pub fn dst_pair(&self, o: &Operand, ty: Type) -> Result<(Dst, PredDst)> {
        match o {
            Operand::Pair(d, p) => {
                Ok((self.dst(&Operand::Name(d.clone()), ty)?, self.pred_dst_named(p)?))
            }
            o => Ok((self.dst(o, ty)?, PredDst(None))),
        }
    }

    /// `p|q`, or a lone `p`.
    pub fn pred_pair(&self, o: &Operand) -> Result<(PredDst, PredDst)> {
        match o {
            Operand::Pair(p, q) => Ok((self.pred_dst_named(p)?, self.pred_dst_named(q)?)),
            o => Ok((self.pred_dst(o)?, PredDst(None))),
        }
    }

    fn predicate(&self, name: &str, negated: bool) -> Result<Pred> {
        match self.lookup(name) {
            Some(Symbol::Predicate(slot)) => Ok(Pred::Reg { slot, negated }),
            _ => Err(format!("{name} is no predicate")),
        }
    }

    /// A predicate operand: `p`, `!p`, or a constant.
    pub fn pred(&self, o: &Operand) -> Result<Pred> {
        match o {
            Operand::Name(name) => self.predicate(name, false),
            Operand::Not(name) => self.predicate(name, true),
            Operand::Int(v) => Ok(Pred::Constant(*v != 0)),
            _ => Err("the operand is no predicate".into()),
        }
    }

    /// A value of type `ty`: register, special register, constant, or the address of a variable.
    pub fn src(&self, o: &Operand, ty: Type) -> Result<Src> {
        match o {
            Operand::Int(v) if matches!(ty, Type::F32) => {
                Ok(Src::imm(u64::from((*v as i64 as f32).to_bits())))
            }
            Operand::Int(v) if matches!(ty, Type::F64) => {
                Ok(Src::imm((*v as i64 as f64).to_bits()))
            }
            Operand::Int(v) => Ok(Src::imm(v & mask(ty.size()))),
            Operand::F32(bits) => Ok(Src::imm((*bits).into())),
            Operand::F64(bits) if ty == Type::F32 => {
                Ok(Src::imm((f64::from_bits(*bits) as f32).to_bits().into()))
            }
            Operand::F64(bits) => Ok(Src::imm(*bits)),
            Operand::Name(name) => self.named(name, ty),
            Operand::Sum(name, offset) => match self.named(name, ty)? {
                Src::Imm(v) => Ok(Src::imm(v[0].wrapping_add(*offset as u64))),
                Src::Reg(_) => Err(format!("{name}{offset:+} as a value is not supported")),
            },
            _ => Err("the operand is no value".into()),
        }
    }

    /// Values of a vector, or of a single operand.
    pub fn srcs(&self, o: &Operand, ty: Type) -> Result<Vec<Src>> {
        match o {
            Operand::Vector(v) => v.iter().map(|o| self.src(o, ty)).collect(),
            o => Ok(vec![self.src(o, ty)?]),
        }
    }

    fn named(&self, name: &str, ty: Type) -> Result<Src> {
        match self.lookup(name) {
            Some(Symbol::Register { slot, ty: declared }) if fits(declared, ty) => {
                Ok(Src::Reg(slot))
            }
            Some(Symbol::Register { ty: declared, .. }) => {
                Err(format!("{name} is declared .{declared}, not fit for .{ty}"))
            }
            Some(Symbol::Predicate(_)) => Err(format!("{name} is a predicate")),
            Some(Symbol::Param(i)) => Ok(Src::imm(self.flat.params[i as usize].offset.into())),
            Some(Symbol::Frame(offset)) => Ok(Src::imm(offset.into())),
            Some(Symbol::Shared(i)) => Ok(self.preset(Preset::SharedVariable(i))),
            Some(Symbol::DynamicShared) => Ok(self.preset(Preset::DynamicArray)),
            Some(Symbol::Global(address, _)) => Ok(Src::imm(address)),
            None => match ops::special(name) {
                Some(preset) => Ok(match preset {
                    ops::Special::Preset(p) => self.preset(p),
                    ops::Special::Constant(v) => Src::imm(v),
                }),
                None => Err(format!("{name} is not declared")),
            },
        }
    }

    /// A memory operand.
    pub fn address(&self, o: &Operand) -> Result<Address> {
        match o {
            Operand::Address { base: Base::Absolute(a), offset, .. } => {
                let address = a.wrapping_add(*offset as u64);
                Ok(Address { base: Src::imm(address), offset: 0, symbol: None })
            }
            Operand::Address { base: Base::Name(name), offset, .. } => {
                let (ty, symbol) = match self.lookup(name) {
                    Some(Symbol::Register { ty, .. }) => (ty, None),
                    Some(Symbol::Param(_)) => (Type::B64, Some(Space::Param)),
                    Some(Symbol::Frame(_)) => (Type::B64, Some(Space::Local)),
                    Some(Symbol::Shared(_) | Symbol::DynamicShared) => {
                        (Type::B32, Some(Space::Shared))
                    }
                    Some(Symbol::Global(_, space)) => (Type::B64, Some(space)),
                    _ => return Err(format!("{name} is no address")),
                };
                Ok(Address { base: self.named(name, ty)?, offset: *offset, symbol })
            }
            _ => Err("the operand is no address".into()),
        }
    }

    /// The coordinates beside an address: `[map, {c0, c1}]`.
    pub fn coordinates(&self, o: &Operand) -> Result<Vec<Src>> {
        match o {
            Operand::Address { coordinates: Some(c), .. } => {
                c.iter().map(|o| self.src(o, Type::S32)).collect()
            }
            _ => Err("the operand has no coordinates".into()),
        }
    }

    /// Target of a branch.
    pub fn label(&self, o: &Operand) -> Result<u32> {
        match o {
            Operand::Name(name) => {
                self.flat.label(self.scope, name).ok_or_else(|| format!("no label {name} here"))
            }
            _ => Err("the target is no label".into()),
        }
    }

    /// Where `ret` goes; None: it ends the thread.
    pub fn return_target(&self) -> Option<u32> {
        self.flat.return_target(self.scope)
    }
}

/// Whether a register declared `declared` can hold a value of type `ty`: of its size, or larger for
/// the untyped moves that ld, st and cvt allow.
fn fits(declared: Type, ty: Type) -> bool {
    ty != Type::Pred && declared.size() >= ty.size()
}

/// The low `bytes` bytes.
pub fn mask(bytes: u32) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 }
}

/// A mnemonic being taken apart. What nobody takes is an error.
pub struct Opcode<'a> {
    /// The instruction.
    pub instr: &'a ast::Instr,
    rest: Vec<&'a str>,
}

impl<'a> Opcode<'a> {
    fn new(instr: &'a ast::Instr) -> Self {
        Self { instr, rest: instr.mods.iter().map(String::as_str).collect() }
    }

    /// First part of the mnemonic.
    pub fn root(&self) -> &'a str {
        &self.instr.root
    }

    /// Takes a modifier if it is there.
    pub fn take(&mut self, name: &str) -> bool {
        let found = self.rest.iter().position(|m| *m == name);
        found.map(|i| self.rest.remove(i)).is_some()
    }

    /// Takes a modifier that must be there.
    pub fn expect(&mut self, name: &str) -> Result<()> {
        if self.take(name) { Ok(()) } else { Err(format!(".{name} is missing")) }
    }

    /// Takes the first modifier of a table that is there.
    pub fn one_of<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        let found = self.rest.iter().enumerate().find_map(|(i, m)| {
            table.iter().find(|(name, _)| name == m).map(|(_, value)| (i, *value))
        });
        found.map(|(i, value)| {
            self.rest.remove(i);
            value
        })
    }

    /// Takes all modifiers that start with `prefix`.
    pub fn take_prefixed(&mut self, prefix: &str) -> Vec<&'a str> {
        let (taken, rest) =
            std::mem::take(&mut self.rest).into_iter().partition(|m| m.starts_with(prefix));
        self.rest = rest;
        taken
    }

    /// Takes all type modifiers, in order.
    pub fn types(&mut self) -> Vec<Type> {
        let mut types = Vec::new();
        self.rest.retain(|m| match m.parse::<Type>() {
            Ok(ty) => {
                types.push(ty);
                false
            }
            Err(_) => true,
        });
        types
    }

    /// Takes the one type modifier.
    pub fn ty(&mut self) -> Result<Type> {
        match self.types()[..] {
            [ty] => Ok(ty),
            [] => Err("the type is missing".into()),
            _ => Err("more than one type".into()),
        }
    }

    /// Exactly `N` operands.
    pub fn operands<const N: usize>(&self) -> Result<&'a [Operand; N]> {
        let o = self.instr.operands.as_slice();
        o.try_into().map_err(|_| format!("{} operands, {N} expected", o.len()))
    }

    /// The modifiers nobody took.
    pub fn rest(&self) -> &[&'a str] {
        &self.rest
    }

    fn finish(&self) -> Result<()> {
        match self.rest[..] {
            [] => Ok(()),
            [first, ..] => Err(format!("modifier .{first} is not supported here")),
        }
    }
}
