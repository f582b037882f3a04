//! ld, st and what else takes plain addresses: ldu, prefetch, isspacep, discard, createpolicy.

use crate::access::Window;
use crate::ast::{Operand, Space, Type};
use crate::clock::Scope;
use crate::context::lanes;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result, mask};
use crate::memory::{SHARED_WINDOW, Target, target};
use crate::program::{Address, Decoded, Lanes, Src};

/// Modifiers that only advise the caches.
const HINTS: [&str; 16] = [
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::64B",
    "L2::128B",
    "L2::256B",
];

/// ld, ldu, st, prefetch, prefetchu, discard, isspacep, createpolicy.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match op.root() {
        "ld" | "ldu" => load(op, env),
        "st" => store(op, env),
        "isspacep" => isspacep(op, env),
        "createpolicy" => createpolicy(op, env),
        _ => prefetch(op, env),
    }
}

/// Takes the scope of a strong access.
pub fn scope(op: &mut Opcode<'_>) -> Option<Scope> {
    op.one_of(&[
        ("cta", Scope::Cta),
        ("cluster", Scope::Cluster),
        ("gpu", Scope::Gpu),
        ("sys", Scope::Sys),
    ])
}

/// Takes the state space, if one is written.
pub fn window(op: &mut Opcode<'_>) -> Option<Window> {
    op.one_of(&[
        ("global", Window::Global),
        ("const", Window::Const),
        ("shared", Window::Shared),
        ("shared::cta", Window::Shared),
        ("shared::cluster", Window::Shared),
        ("local", Window::Local),
        ("param", Window::Param),
        ("param::entry", Window::Param),
        ("param::func", Window::Param),
    ])
}

/// Takes cache hints; true when a cache policy operand follows.
pub fn hints(op: &mut Opcode<'_>) -> bool {
    HINTS.iter().for_each(|h| {
        op.take(h);
    });
    op.take("L2::cache_hint")
}

/// How an access orders memory.
#[derive(Clone, Copy)]
struct Order {
    strong: Option<Scope>,
    /// Acquire for loads, release for stores.
    synchronises: bool,
}

fn order(op: &mut Opcode<'_>, synchronising: &str) -> Result<Order> {
    op.take("weak");
    let synchronises = op.take(synchronising);
    let volatile = op.take("volatile");
    let strong = op.take("relaxed") || synchronises || volatile || op.take("mmio");
    let scope = scope(op);
    match (strong, scope) {
        (true, None) if volatile => Ok(Order { strong: Some(Scope::Sys), synchronises }),
        (true, None) => Err("the scope is missing".into()),
        (false, Some(_)) => Err("a scope without .relaxed, .acquire or .release".into()),
        (_, strong) => Ok(Order { strong, synchronises }),
    }
}

/// Space, bytes per element and number of elements; the window of a named variable wins, because
/// the parameters of a call live in the frame.
fn shape(op: &mut Opcode<'_>, a: &Address) -> Result<(Window, Type, usize)> {
    let named = match (window(op), a.symbol) {
        (Some(Window::Param), Some(Space::Local)) => Window::Local,
        (Some(window), _) => window,
        (None, symbol) => symbol.map_or(Window::Generic, Window::of),
    };
    let count = op.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
    let ty = op.ty()?;
    if ty.size() as usize * count > 16 {
        return Err(format!("{count} elements of .{ty} are more than 16 bytes"));
    }
    Ok((named, ty, count))
}

fn policy(env: &Env<'_>, o: &[Operand], has: bool) -> Result<()> {
    match (o, has) {
        ([], false) => Ok(()),
        ([policy], true) => env.src(policy, Type::B64).map(drop),
        _ => Err("wrong number of operands".into()),
    }
}

fn class(window: Window, store: bool) -> Class {
    match (window, store) {
        (Window::Shared, false) => Class::SharedLoad,
        (Window::Shared, true) => Class::SharedStore,
        (Window::Local, _) => Class::Local,
        (Window::Param | Window::Const, _) => Class::Param,
        (_, false) => Class::GlobalLoad,
        (_, true) => Class::GlobalStore,
    }
}

fn load(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let order = order(op, "acquire")?;
    let hint = hints(op);
    let [d, a, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    policy(env, rest, hint)?;
    let address = env.address(a)?;
    let (window, ty, count) = shape(op, &address)?;
    let first = if let Operand::Vector(v) = d { v.first().unwrap_or(d) } else { d };
    let width = mask(env.width(first).unwrap_or(8));
    let d = env.dsts(d, ty)?;
    if d.len() != count {
        return Err(format!("{} destinations for {count} elements", d.len()));
    }
    let bytes = ty.size() * count as u32;
    // A load sign-extends into a wider register.
    let signed = matches!(ty, Type::S8 | Type::S16 | Type::S32);
    let (bits, keep) = (8 * ty.size(), mask(ty.size()));
    let extend = move |v: u64| {
        let shift = 64 - bits;
        if signed { ((v << shift) as i64 >> shift) as u64 & width } else { v }
    };
    Ok(Decoded::next(class(window, false), move |cx| {
        let at = cx.addresses(&address);
        let v = cx.load(window, bytes, &at, order.strong);
        for (i, d) in d.iter().enumerate() {
            let at = bits * i as u32;
            cx.write(*d, &std::array::from_fn(|l| extend(field(v[l], at) & keep)));
        }
        if let Some(scope) = order.strong {
            for l in lanes(cx.mask) {
                cx.observe(l, window, at[l], scope, order.synchronises);
            }
        }
    }))
}

/// What begins at bit `at` and lies in one half: quicker than a shift of 128 bits.
fn field(v: u128, at: u32) -> u64 {
    let half = if at < 64 { v } else { v >> 64 };
    half as u64 >> (at % 64)
}

/// A value moved to bit `at`, within one half.
fn placed(v: u64, at: u32) -> u128 {
    let half = u128::from(v << (at % 64));
    if at < 64 { half } else { half << 64 }
}

fn store(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let order = order(op, "release")?;
    let hint = hints(op);
    let [a, v, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    policy(env, rest, hint)?;
    let address = env.address(a)?;
    let (window, ty, count) = shape(op, &address)?;
    let v = env.srcs(v, ty)?;
    if v.len() != count {
        return Err(format!("{} values for {count} elements", v.len()));
    }
    let bytes = ty.size() * count as u32;
    let (bits, keep) = (8 * ty.size(), mask(ty.size()));
    Ok(Decoded::next(class(window, true), move |cx| {
        let at = cx.addresses(&address);
        let mut values = [0u128; 32];
        for (i, v) in v.iter().enumerate() {
            let (v, at) = (cx.read(v), bits * i as u32);
            (0..32).for_each(|l| values[l] |= placed(v[l] & keep, at));
        }
        match order.strong {
            None => cx.forget(window, bytes, &at),
            Some(scope) => {
                for l in lanes(cx.mask) {
                    cx.publish(l, window, at[l], scope, order.synchronises, false);
                }
            }
        }
        cx.store(window, bytes, &at, &values, order.strong);
    }))
}

/// Addresses are read and otherwise nothing happens.
fn prefetch(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    for m in ["L1", "L2", "tensormap", "L2::evict_last", "L2::evict_normal", "L2::128B"] {
        op.take(m);
    }
    window(op);
    let [a, size @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    let a = env.address(a)?;
    let size = size.iter().map(|o| env.src(o, Type::U32)).collect::<Result<Vec<Src>>>()?;
    Ok(Decoded::next(Class::Other, move |cx| {
        cx.check(&a.base);
        size.iter().for_each(|s| cx.check(s));
    }))
}

/// An opaque value that only advises the caches.
fn createpolicy(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    if !(op.take("fractional") || op.take("range") || op.take("cvt")) {
        return Err("kind of policy is missing".into());
    }
    op.take("global");
    op.take("L2");
    op.take_prefixed("L2::");
    op.expect("b64")?;
    let [d, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    let d = env.dst(d, Type::B64)?;
    for o in rest {
        match o {
            Operand::Address { .. } => drop(env.address(o)?),
            o => drop(env.src(o, Type::B32)?),
        }
    }
    Ok(Decoded::next(Class::Other, move |cx| cx.write(d, &[0; 32])))
}

fn isspacep(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let cluster = op.rest().contains(&"shared::cluster");
    let window = window(op).ok_or("the state space is missing")?;
    let [p, a] = op.operands()?;
    let (p, a) = (env.pred_dst(p)?, env.src(a, Type::B64)?);
    Ok(Decoded::next(Class::Predicate, move |cx| {
        let inside = cx.compare(&a, &Src::imm(0), |a, _| match (window, target(a)) {
            (Window::Global, Target::Global { .. }) => true,
            (Window::Shared, Target::Shared(s)) => cluster || s >> crate::memory::RANK_SHIFT == 0,
            (Window::Local, Target::Local(_)) | (Window::Param, Target::Param(_)) => true,
            _ => false,
        });
        cx.set(p, inside);
    }))
}

impl crate::context::Cx<'_, '_> {
    /// A plain store: what atomics at these addresses carried is lost.
    fn forget(&mut self, window: Window, bytes: u32, at: &Lanes) {
        if !self.grid.options.checks {
            return;
        }
        for l in lanes(self.mask) {
            match (window, target(at[l])) {
                (Window::Global, _) | (Window::Generic, Target::Global { .. })
                    if self.grid.has_sync() =>
                {
                    self.grid.sync().weak_store(at[l], bytes);
                }
                (Window::Shared, _) | (Window::Generic, Target::Shared(_)) => {
                    if let Some((block, a)) = self.shared_target(at[l] as u32) {
                        let key = SHARED_WINDOW | u64::from(a);
                        self.gang.blocks[block].sync.weak_store(key, bytes);
                    }
                }
                _ => {}
            }
        }
    }
}
