//! atom, red, fence, membar.

use crate::access::Window;
use crate::ast::Type;
use crate::clock::{ProxySpace, Reach, Scope};
use crate::context::lanes;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result, mask};
use crate::ops::load_store::{hints, scope, window};
use crate::program::{Decoded, Src};

/// atom, red, fence, membar.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match op.root() {
        "fence" => fence(op, env),
        "membar" => {
            let levels = [("cta", Scope::Cta), ("gl", Scope::Gpu), ("sys", Scope::Sys)];
            Ok(fence_of(op.one_of(&levels).ok_or("the level is missing")?))
        }
        _ => atomic(op, env),
    }
}

fn fence_of(scope: Scope) -> Decoded {
    let reach = Reach::of(scope);
    Decoded::next(Class::Barrier, move |cx| cx.warp.clock.fence(cx.mask, reach))
}

fn fence(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    if op.take("proxy") {
        return match op.take("tensormap::generic") {
            true => super::tensormap::fence(op, env),
            false => proxy_fence(op),
        };
    }
    let [] = op.operands()?;
    if op.take("mbarrier_init") {
        op.expect("release")?;
        op.expect("cluster")?;
        return Ok(Decoded::next(Class::Barrier, |cx| cx.warp.clock.fence_inits(cx.mask)));
    }
    for m in ["sc", "acq_rel", "acquire", "release"] {
        op.take(m);
    }
    Ok(fence_of(scope(op).ok_or("the scope is missing")?))
}

fn proxy_fence(op: &mut Opcode<'_>) -> Result<Decoded> {
    let [] = op.operands()?;
    if !(op.take("async") || op.take("alias")) {
        return Err("this proxy is not supported".into());
    }
    let space = op.one_of(&[
        ("global", ProxySpace::Global),
        ("shared::cta", ProxySpace::Shared),
        ("shared::cluster", ProxySpace::Shared),
    ]);
    Ok(Decoded::next(Class::Barrier, move |cx| cx.warp.clock.proxy_fence(cx.mask, space)))
}

/// New value of a word from the old one and the operands.
pub type Operation = Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>;

/// The update of this name for this type.
pub fn operation(name: &str, ty: Type) -> Result<Operation> {
    let m = mask(ty.size());
    let bits = 8 * ty.size();
    let signed = move |v: u64| (v << (64 - bits)) as i64 >> (64 - bits);
    let is_signed = matches!(ty, Type::S32 | Type::S64);
    Ok(match (name, ty) {
        ("exch", _) => Box::new(|_, b, _| b),
        ("cas", _) => Box::new(|old, b, c| if old == b { c } else { old }),
        ("and", _) => Box::new(|old, b, _| old & b),
        ("or", _) => Box::new(|old, b, _| old | b),
        ("xor", _) => Box::new(|old, b, _| old ^ b),
        ("inc", Type::U32) => Box::new(|old, b, _| if old >= b { 0 } else { old + 1 }),
        ("dec", Type::U32) => Box::new(|old, b, _| if old == 0 || old > b { b } else { old - 1 }),
        ("add" | "min" | "max", Type::F32 | Type::F64 | Type::F16 | Type::Bf16) => float(name, ty)?,
        ("add" | "min" | "max", Type::F16x2 | Type::Bf16x2) => {
            let half = if ty == Type::F16x2 { Type::F16 } else { Type::Bf16 };
            let f = float(name, half)?;
            Box::new(move |old, b, _| {
                f(old & 0xffff, b & 0xffff, 0) | f(old >> 16, b >> 16, 0) << 16
            })
        }
        ("add", _) => Box::new(move |old, b, _| old.wrapping_add(b) & m),
        ("min", _) if is_signed => {
            Box::new(move |old, b, _| if signed(b) < signed(old) { b } else { old })
        }
        ("max", _) if is_signed => {
            Box::new(move |old, b, _| if signed(b) > signed(old) { b } else { old })
        }
        ("min", _) => Box::new(|old, b, _| old.min(b)),
        ("max", _) => Box::new(|old, b, _| old.max(b)),
        _ => return Err(format!("{name} of .{ty} is not supported")),
    })
}

/// Floating-point updates, as the arithmetic instructions compute them.
fn float(name: &str, ty: Type) -> Result<Operation> {
    use crate::numeric::half::Half;
    use crate::numeric::{Rounding, add_f32, max_f64, min_f64};
    let f32s = |f: fn(f32, f32) -> f32| -> Operation {
        Box::new(move |old, b, _| {
            f(f32::from_bits(old as u32), f32::from_bits(b as u32)).to_bits().into()
        })
    };
    let f64s = |f: fn(f64, f64) -> f64| -> Operation {
        Box::new(move |old, b, _| f(f64::from_bits(old), f64::from_bits(b)).to_bits())
    };
    let halves = |kind: Half, f: fn(Half, u16, u16) -> u16| -> Operation {
        Box::new(move |old, b, _| f(kind, old as u16, b as u16).into())
    };
    let kind = if ty == Type::F16 { Half::F16 } else { Half::Bf16 };
    Ok(match (name, ty) {
        ("add", Type::F32) => f32s(|a, b| add_f32(a, b, Rounding::Nearest)),
        ("add", Type::F64) => f64s(|a, b| a + b),
        ("min", Type::F64) => f64s(min_f64),
        ("max", Type::F64) => f64s(max_f64),
        ("add", Type::F16 | Type::Bf16) => halves(kind, Half::add),
        ("min", Type::F16 | Type::Bf16) => halves(kind, |k, a, b| k.min(a, b, false)),
        ("max", Type::F16 | Type::Bf16) => halves(kind, |k, a, b| k.max(a, b, false)),
        _ => return Err(format!("{name} of .{ty} is not supported")),
    })
}

/// Names of the operations.
pub const OPERATIONS: [&str; 10] =
    ["exch", "cas", "and", "or", "xor", "inc", "dec", "add", "min", "max"];

fn atomic(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let returns = op.root() == "atom";
    let (acq_rel, acquire, release) = (op.take("acq_rel"), op.take("acquire"), op.take("release"));
    op.take("relaxed");
    let (acquire, release) = (acq_rel || acquire, acq_rel || release);
    let scope = scope(op).unwrap_or(Scope::Gpu);
    let hint = hints(op);
    let window = window(op).unwrap_or(Window::Generic);
    op.take("noftz");
    let name = OPERATIONS.into_iter().find(|n| op.take(n)).ok_or("the operation is missing")?;
    let count = op.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
    let ty = op.ty()?;
    if ty.size() * count > 16 {
        return Err(format!("{count} elements of .{ty} are more than 16 bytes"));
    }
    let o = op.instr.operands.as_slice();
    let (d, o) = match (returns, o) {
        (true, [d, rest @ ..]) => (env.dsts(d, ty)?, rest),
        (false, rest) => (Vec::new(), rest),
        _ => return Err("operands are missing".into()),
    };
    let values = 1 + usize::from(name == "cas");
    let [a, rest @ ..] = o else { return Err("operands are missing".into()) };
    if rest.len() != values + usize::from(hint) {
        return Err(format!("{} operands after the address", rest.len()));
    }
    let a = env.address(a)?;
    let b = env.srcs(&rest[0], ty)?;
    let c = if values == 2 { env.src(&rest[1], ty)? } else { Src::imm(0) };
    if b.len() != count as usize || returns && d.len() != count as usize {
        return Err(format!("{} values for {count} elements", b.len()));
    }
    let f = operation(name, ty)?;
    let (size, m) = (ty.size(), mask(ty.size()));
    Ok(Decoded::next(Class::Atomic, move |cx| {
        let at = cx.addresses(&a);
        let b: Vec<_> = b.iter().map(|b| cx.read(b)).collect();
        let c = cx.read(&c);
        // What is released must be there before the value is.
        for l in lanes(cx.mask) {
            cx.publish(l, window, at[l], scope, release, true);
        }
        let old =
            cx.update(window, size, count, &at, scope, |l, i, old| f(old & m, b[i][l], c[l]) & m);
        for l in lanes(cx.mask) {
            cx.observe(l, window, at[l], scope, acquire);
        }
        for (i, d) in d.iter().enumerate() {
            cx.write(*d, &std::array::from_fn(|l| (old[l] >> (8 * size as usize * i)) as u64 & m));
        }
    }))
}
