//! Lexical scopes: what a name means at an instruction, and the flat order of instructions.
//!
//! Device functions are expanded where they are called: their parameters become aliases of the
//! caller's, their `ret` a jump behind the call.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::ast::{self, Base, Item, Operand, Pos, Space, Type};
use crate::decode::DecodeError;
use crate::program::{Param, Variable};

/// Calls inside calls that are expanded; recursion ends here.
const MAX_CALL_DEPTH: usize = 32;
/// Instructions of an expanded kernel.
const MAX_INSTRUCTIONS: usize = 4_000_000;
/// Least bytes between two local variables.
const RED_ZONE: u32 = 64;

/// What a name stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Symbol {
    /// Data register.
    Register {
        /// Slot.
        slot: u32,
        /// Declared type.
        ty: Type,
    },
    /// Predicate register.
    Predicate(u32),
    /// Kernel parameter, by number.
    Param(u32),
    /// Local variable or call parameter at a byte offset of the thread's frame.
    Frame(u32),
    /// Static shared variable, by number.
    Shared(u32),
    /// The dynamic shared array.
    DynamicShared,
    /// Module variable, by its address.
    Global(u64, Space),
}

/// One block `{ … }`.
#[derive(Default)]
struct Scope {
    parent: Option<usize>,
    names: HashMap<String, Symbol>,
    /// `.reg .b32 %r<5>`: prefix, count, first slot or predicate, type.
    ranges: Vec<(String, u32, u32, Type)>,
    labels: HashMap<String, u32>,
    /// Of an expanded device function: index into `Flat::returns`.
    returns: Option<usize>,
}

/// An instruction and where it stands.
pub struct Placed<'a> {
    /// The instruction.
    pub instr: &'a ast::Instr,
    /// Its scope.
    pub scope: usize,
    /// CUDA file and line.
    pub source: Option<(u32, u32)>,
}

/// A kernel laid out flat, with all names known.
pub struct Flat<'a> {
    module: &'a ast::Module,
    scopes: Vec<Scope>,
    /// Program counter behind each expanded call.
    returns: Vec<u32>,
    /// Instructions in order.
    pub instrs: Vec<Placed<'a>>,
    /// Names of the data registers by slot.
    pub register_names: Vec<String>,
    /// Number of predicates.
    pub predicates: u32,
    /// Kernel parameters.
    pub params: Vec<Param>,
    /// Static shared variables.
    pub shared: Vec<Variable>,
    /// Bytes of static shared memory.
    pub static_shared: u32,
    /// Alignment of the dynamic shared array.
    pub dynamic_align: u32,
    /// Local variables and call parameters, by offset.
    pub locals: Vec<Variable>,
    /// Bytes of the frame.
    pub frame: u32,
    source: Option<(u32, u32)>,
    depth: usize,
}

impl<'a> Flat<'a> {
    /// Lays out `kernel`; `addresses` holds those of the module's variables.
    pub fn new(
        module: &'a ast::Module,
        kernel: &'a ast::Function,
        addresses: &BTreeMap<String, u64>,
    ) -> Result<Self, DecodeError> {
        let mut flat = Self {
            module,
            scopes: vec![Scope::default()],
            returns: Vec::new(),
            instrs: Vec::new(),
            register_names: Vec::new(),
            predicates: 0,
            params: Vec::new(),
            shared: Vec::new(),
            static_shared: 0,
            dynamic_align: 1,
            locals: Vec::new(),
            frame: 0,
            source: None,
            depth: 0,
        };
        let mut used = HashSet::new();
        let bodies = module.functions.iter().filter(|f| !f.entry || f.name == kernel.name);
        bodies.filter_map(|f| f.body.as_ref()).for_each(|body| mentions(body, &mut used));
        for v in &module.variables {
            match v.space {
                // Only what the kernel uses takes up its shared memory.
                Space::Shared if !used.contains(v.name.as_str()) => {}
                Space::Shared => flat.declare(0, v)?,
                space => {
                    let address = addresses.get(&v.name).copied().unwrap_or_default();
                    flat.scopes[0].names.insert(v.name.clone(), Symbol::Global(address, space));
                }
            }
        }
        let scope = flat.open(Some(0));
        for p in &kernel.params {
            let bytes = flat.bytes(p)?;
            let align = p.align.unwrap_or(p.ty.size() * p.vector).max(1);
            let end = flat.params.last().map_or(0, |p| p.offset + p.bytes);
            let offset = end.next_multiple_of(align);
            flat.scopes[scope]
                .names
                .insert(p.name.clone(), Symbol::Param(flat.params.len() as u32));
            flat.params.push(Param { name: p.name.clone(), offset, bytes });
        }
        let body = kernel.body.as_ref().ok_or_else(|| {
            DecodeError::new(kernel.pos, format!("kernel {} has no body", kernel.name))
        })?;
        flat.place(scope, body)?;
        Ok(flat)
    }

    fn open(&mut self, parent: Option<usize>) -> usize {
        self.scopes.push(Scope { parent, ..Scope::default() });
        self.scopes.len() - 1
    }

    /// Size of a variable in bytes.
    fn bytes(&self, v: &ast::Variable) -> Result<u32, DecodeError> {
        let count = v.dims.iter().try_fold(1u64, |n, d| n.checked_mul(d.unwrap_or(0)));
        count
            .and_then(|n| n.checked_mul(u64::from(v.ty.size() * v.vector)))
            .filter(|bytes| *bytes < 1 << 30)
            .map(|bytes| bytes as u32)
            .ok_or_else(|| DecodeError::new(v.pos, format!("variable {} is too large", v.name)))
    }

    fn declare(&mut self, scope: usize, v: &ast::Variable) -> Result<(), DecodeError> {
        if v.space == Space::Reg {
            return self.declare_registers(scope, v);
        }
        let align = v.align.unwrap_or(v.ty.size() * v.vector).max(1);
        if !align.is_power_of_two() || align > 1 << 16 {
            return Err(DecodeError::new(v.pos, format!("{} has alignment {align}", v.name)));
        }
        let bytes = self.bytes(v)?;
        let symbol = match v.space {
            Space::Shared if v.dims.contains(&None) => {
                self.dynamic_align = self.dynamic_align.max(align);
                Symbol::DynamicShared
            }
            Space::Shared => {
                let offset = self.static_shared.next_multiple_of(align);
                self.static_shared = offset.saturating_add(bytes);
                self.shared.push(Variable { name: v.name.clone(), offset, bytes, align });
                Symbol::Shared(self.shared.len() as u32 - 1)
            }
            Space::Local | Space::Param => {
                let offset = self.frame.next_multiple_of(align);
                self.frame = offset.saturating_add(bytes).saturating_add(RED_ZONE);
                self.locals.push(Variable { name: v.name.clone(), offset, bytes, align });
                Symbol::Frame(offset)
            }
            space => {
                let text = format!("variable {} of space {space:?} inside a function", v.name);
                return Err(DecodeError::new(v.pos, text));
            }
        };
        self.scopes[scope].names.insert(v.name.clone(), symbol);
        Ok(())
    }

    fn declare_registers(&mut self, scope: usize, v: &ast::Variable) -> Result<(), DecodeError> {
        if v.vector != 1 || !v.dims.is_empty() {
            let text = format!("register {}: vector registers are not supported", v.name);
            return Err(DecodeError::new(v.pos, text));
        }
        if v.ty == Type::B128 {
            let text = format!("register {}: .b128 is not supported", v.name);
            return Err(DecodeError::new(v.pos, text));
        }
        let count = v.range.unwrap_or(1);
        let used = self.predicates as usize + self.register_names.len();
        if used + count as usize > 1 << 22 {
            return Err(DecodeError::new(v.pos, "more than 4 million registers".into()));
        }
        let first = if v.ty == Type::Pred {
            self.predicates += count;
            self.predicates - count
        } else {
            let first = self.register_names.len() as u32;
            let name =
                |i| if v.range.is_some() { format!("{}{i}", v.name) } else { v.name.clone() };
            self.register_names.extend((0..count).map(name));
            first
        };
        if v.range.is_some() {
            self.scopes[scope].ranges.push((v.name.clone(), count, first, v.ty));
        } else {
            self.scopes[scope].names.insert(v.name.clone(), register(v.ty, first));
        }
        Ok(())
    }

    fn place(&mut self, scope: usize, items: &'a [Item]) -> Result<(), DecodeError> {
        for item in items {
            match item {
                Item::Loc(loc) => self.source = Some((loc.file, loc.line)),
                Item::Variable(v) => self.declare(scope, v)?,
                Item::Label { name, pos } => {
                    let pc = self.instrs.len() as u32;
                    if self.scopes[scope].labels.insert(name.clone(), pc).is_some() {
                        return Err(DecodeError::new(*pos, format!("label {name} defined twice")));
                    }
                }
                Item::Block(items) => {
                    let inner = self.open(Some(scope));
                    self.place(inner, items)?;
                }
                Item::Instr(instr) if instr.root == "call" && system_call(instr).is_none() => {
                    self.call(scope, instr)?;
                }
                Item::Instr(instr) => {
                    if self.instrs.len() == MAX_INSTRUCTIONS {
                        return Err(DecodeError::new(instr.pos, "kernel too long".into()));
                    }
                    self.instrs.push(Placed { instr, scope, source: self.source });
                }
            }
        }
        Ok(())
    }

    /// Expands `call (ret), name, (args)`.
    fn call(&mut self, scope: usize, instr: &'a ast::Instr) -> Result<(), DecodeError> {
        let error = |text: String| DecodeError::new(instr.pos, text);
        if instr.guard.is_some() {
            return Err(error("a guarded call is not supported".into()));
        }
        let (returns, name, args): (&[Operand], _, &[Operand]) = match instr.operands.as_slice() {
            [Operand::Name(f)] => (&[], f, &[]),
            [Operand::Name(f), Operand::List(args)] => (&[], f, args),
            [Operand::List(r), Operand::Name(f)] => (r, f, &[]),
            [Operand::List(r), Operand::Name(f), Operand::List(args)] => (r, f, args),
            _ => return Err(error("operands of call not understood".into())),
        };
        let functions = &self.module.functions;
        let function = functions.iter().find(|f| &f.name == name && f.body.is_some());
        let Some((function, body)) = function.and_then(|f| Some((f, f.body.as_ref()?))) else {
            return Err(error(format!("call of {name}, which has no body here")));
        };
        if self.depth == MAX_CALL_DEPTH {
            return Err(error(format!("{name} is called more than {MAX_CALL_DEPTH} levels deep")));
        }
        let formal = function.returns.iter().chain(&function.params);
        let actual: Vec<_> = returns.iter().chain(args).collect();
        if formal.clone().count() != actual.len() {
            return Err(error(format!("call of {name} with {} arguments", actual.len())));
        }
        let inner = self.open(Some(0));
        self.scopes[inner].returns = Some(self.returns.len());
        self.returns.push(0);
        let index = self.returns.len() - 1;
        for (formal, actual) in formal.zip(actual) {
            let symbol = match actual {
                Operand::Name(name) => self.lookup(scope, name),
                _ => None,
            };
            let Some(symbol @ Symbol::Frame(_)) = symbol else {
                return Err(error(format!("argument {} of {name} is no .param", formal.name)));
            };
            self.scopes[inner].names.insert(formal.name.clone(), symbol);
        }
        self.depth += 1;
        let source = self.source;
        self.place(inner, body)?;
        self.source = source;
        self.depth -= 1;
        self.returns[index] = self.instrs.len() as u32;
        Ok(())
    }

    /// The scopes from the inside out.
    fn chain(&self, scope: usize) -> impl Iterator<Item = &Scope> {
        std::iter::successors(Some(&self.scopes[scope]), |s| s.parent.map(|p| &self.scopes[p]))
    }

    /// What `name` means in a scope.
    pub fn lookup(&self, scope: usize, name: &str) -> Option<Symbol> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = name[stem.len()..].parse::<u32>().ok();
        self.chain(scope).find_map(|s| {
            let ranged = || {
                let number = number?;
                let (_, _, first, ty) =
                    s.ranges.iter().find(|(p, count, ..)| p == stem && number < *count)?;
                Some(register(*ty, first + number))
            };
            s.names.get(name).copied().or_else(ranged)
        })
    }

    /// Program counter of a label.
    pub fn label(&self, scope: usize, name: &str) -> Option<u32> {
        self.chain(scope).find_map(|s| s.labels.get(name).copied())
    }

    /// Where `ret` goes; None: it ends the thread.
    pub fn return_target(&self, scope: usize) -> Option<u32> {
        self.chain(scope).find_map(|s| s.returns).map(|i| self.returns[i])
    }
}

/// A function of the system, which has no body in the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SystemCall {
    /// `__assertfail`: an `assert` has failed.
    AssertFail,
    /// `vprintf`.
    Printf,
}

/// The function of the system that a call names, if it does.
pub fn system_call(instr: &ast::Instr) -> Option<SystemCall> {
    instr.operands.iter().find_map(|o| match o {
        Operand::Name(f) if f == "__assertfail" => Some(SystemCall::AssertFail),
        Operand::Name(f) if f == "vprintf" => Some(SystemCall::Printf),
        _ => None,
    })
}

/// Collects the names that stand in operands.
fn mentions<'a>(items: &'a [Item], names: &mut HashSet<&'a str>) {
    for item in items {
        match item {
            Item::Block(items) => mentions(items, names),
            Item::Instr(i) => i.operands.iter().for_each(|o| mentions_of(o, names)),
            _ => {}
        }
    }
}

fn mentions_of<'a>(operand: &'a Operand, names: &mut HashSet<&'a str>) {
    match operand {
        Operand::Name(name) | Operand::Address { base: Base::Name(name), .. } => {
            names.insert(name);
        }
        Operand::Vector(v) | Operand::List(v) => v.iter().for_each(|o| mentions_of(o, names)),
        _ => {}
    }
}

fn register(ty: Type, slot: u32) -> Symbol {
    if ty == Type::Pred { Symbol::Predicate(slot) } else { Symbol::Register { slot, ty } }
}

impl DecodeError {
    /// An error at a position of the text.
    pub fn new(pos: Pos, message: String) -> Self {
        Self { pos, message }
    }
}
