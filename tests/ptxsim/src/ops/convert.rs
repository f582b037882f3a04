//! cvt: between integers, f16, bf16, tf32, f32 and f64.

use crate::ast::{Operand, Type};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::numeric::convert::{
    f32_to_tf32, float_to_int, int_to_f32, int_to_f64, int_to_int, int_to_odd, to_integral,
};
use crate::numeric::half::{Half, pack};
use crate::numeric::{self, Rounding, f64_to_f32};
use crate::ops::integer::int;
use crate::program::{Decoded, Src};

const ROUNDINGS: [(&str, Rounding); 9] = [
    ("rn", Rounding::Nearest),
    ("rz", Rounding::Zero),
    ("rm", Rounding::Down),
    ("rp", Rounding::Up),
    ("rna", Rounding::NearestAway),
    ("rni", Rounding::Nearest),
    ("rzi", Rounding::Zero),
    ("rmi", Rounding::Down),
    ("rpi", Rounding::Up),
];

/// How a conversion treats its value.
#[derive(Clone, Copy)]
struct Mode {
    rounding: Rounding,
    /// Whether a rounding is written.
    rounds: bool,
    /// To an integral value (`.rni` and the like).
    integral: bool,
    flush: bool,
    saturate: bool,
    relu: bool,
}

impl Mode {
    fn take(op: &mut Opcode<'_>) -> Self {
        let integral = op.rest().iter().any(|m| matches!(*m, "rni" | "rzi" | "rmi" | "rpi"));
        let rounding = op.one_of(&ROUNDINGS);
        let (rounds, rounding) = (rounding.is_some(), rounding.unwrap_or(Rounding::Nearest));
        let flush = op.take("ftz");
        let saturate = op.take("sat");
        Self { rounding, rounds, integral, flush, saturate, relu: op.take("relu") }
    }

    /// A rounding must be written exactly where a conversion may round.
    fn check(self, to: Type, from: Type) -> Result<()> {
        let (integer_to, integer_from) = (int(to).is_ok(), int(from).is_ok());
        let needed = match (integer_from, integer_to) {
            (true, true) => false,
            (false, true) => return self.expect(true),
            (true, false) => true,
            (false, false) => to.size() < from.size(),
        };
        match (needed, self.rounds) {
            (true, _) => self.expect(false),
            (false, true) if integer_from || to.size() > from.size() => {
                Err("a rounding where nothing is rounded".into())
            }
            (false, _) => Ok(()),
        }
    }

    fn expect(self, integral: bool) -> Result<()> {
        match (self.rounds, self.integral == integral) {
            (true, true) => Ok(()),
            (_, _) if integral => Err("one of .rni, .rzi, .rmi and .rpi is missing".into()),
            (_, _) => Err("one of .rn, .rz, .rm and .rp is missing".into()),
        }
    }
}

/// A value on its way: exact for every source type.
#[derive(Clone, Copy)]
enum Value {
    Int(i128),
    Float(f64),
}

type Read = Box<dyn Fn(u64) -> Value + Send + Sync>;
type Write = Box<dyn Fn(Value) -> u64 + Send + Sync>;

/// cvt.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    if op.take("pack") {
        return pack_integers(op, env);
    }
    let tf32 = op.take("tf32");
    let mode = Mode::take(op);
    let types = op.types();
    let [d, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    let (to, from) = match (tf32, &types[..]) {
        (false, [to, from]) => (*to, *from),
        (true, [from]) => (Type::B32, *from),
        _ => return Err("two types are needed".into()),
    };
    if tf32 {
        let [a] = rest else { return Err("one source is needed".into()) };
        let (d, a) = (env.dst(d, to)?, env.src(a, from)?);
        return Ok(Decoded::next(Class::Convert, move |cx| {
            cx.map1(d, &a, |a| {
                let x = f32::from_bits(a as u32);
                let x = if mode.relu && x <= 0.0 { 0.0 } else { x };
                f32_to_tf32(x, mode.rounding).into()
            });
        }));
    }
    match (to, rest) {
        (Type::F16x2 | Type::Bf16x2, [a, b]) => packed(env, mode, (to, from), d, a, b),
        (_, [a]) => single(env, mode, to, from, d, a),
        (_, rest) => Err(format!("{} sources", rest.len())),
    }
}

/// `cvt.pack.sat`: `a` above `b`, both clamped; of 8-bit results below what `c` holds.
fn pack_integers(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    op.expect("sat")?;
    let (to, third) = match op.types()[..] {
        [to @ (Type::U16 | Type::S16), Type::S32] => (int(to)?, false),
        [to @ (Type::U8 | Type::S8), Type::S32, Type::B32] => (int(to)?, true),
        _ => return Err("these types are not supported here".into()),
    };
    let [d, a, b, c @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    if c.len() != usize::from(third) {
        return Err(format!("{} operands", c.len() + 3));
    }
    let c = c.first().map_or(Ok(Src::imm(0)), |c| env.src(c, Type::B32))?;
    let (d, a, b) = (env.dst(d, Type::B32)?, env.src(a, Type::S32)?, env.src(b, Type::S32)?);
    let narrow = move |v| int_to_int(v, numeric::int::Int::signed(32), to, true);
    Ok(Decoded::next(Class::Convert, move |cx| {
        cx.map3(d, &a, &b, &c, |a, b, c| {
            (c << (2 * to.bits) | narrow(a) << to.bits | narrow(b)) & 0xFFFF_FFFF
        });
    }))
}

/// `cvt.rn.bf16x2.f32 d, a, b`: a becomes the upper half.
fn packed(
    env: &Env<'_>,
    mode: Mode,
    (to, from): (Type, Type),
    d: &Operand,
    a: &Operand,
    b: &Operand,
) -> Result<Decoded> {
    if from != Type::F32 {
        return Err(format!("from .{from}; only .f32 is possible"));
    }
    let kind = if to == Type::F16x2 { Half::F16 } else { Half::Bf16 };
    let (d, a, b) = (env.dst(d, Type::B32)?, env.src(a, from)?, env.src(b, from)?);
    let one = move |v: u64| {
        let h = kind.from_f32(f32::from_bits(v as u32), mode.rounding);
        if mode.relu { kind.relu(h) } else { h }
    };
    Ok(Decoded::next(Class::Convert, move |cx| {
        cx.map2(d, &a, &b, |a, b| pack(one(b), one(a)).into());
    }))
}

fn single(
    env: &Env<'_>,
    mode: Mode,
    to: Type,
    from: Type,
    d: &Operand,
    a: &Operand,
) -> Result<Decoded> {
    mode.check(to, from)?;
    let width = env.width(d)?;
    let (d, a) = (env.dst(d, to)?, env.src(a, from)?);
    let class = Class::Convert;
    // The frequent ones without the detour.
    match (from, to) {
        (Type::Bf16, Type::F32) if !mode.saturate => {
            return Ok(Decoded::next(class, move |cx| {
                cx.map1(d, &a, |a| Half::Bf16.to_f32(a as u16).to_bits().into());
            }));
        }
        (Type::F32, Type::F16 | Type::Bf16) if !mode.integral && !mode.saturate && !mode.flush => {
            let kind = if to == Type::F16 { Half::F16 } else { Half::Bf16 };
            return Ok(Decoded::next(class, move |cx| {
                cx.map1(d, &a, |a| {
                    let h = kind.from_f32(f32::from_bits(a as u32), mode.rounding);
                    if mode.relu { kind.relu(h).into() } else { h.into() }
                });
            }));
        }
        _ => {}
    }
    if let (Ok(x), Ok(y)) = (int(from), int(to)) {
        // A narrow signed result is extended into a wider register.
        let extended = numeric::int::Int { bits: 8 * width.max(to.size()), signed: y.signed };
        let convert = move |a| {
            let v = int_to_int(a, x, y, mode.saturate);
            int_to_int(v, y, extended, false)
        };
        let narrows = to.size() <= 4 && !mode.saturate;
        return Ok(match from.size() <= 4 || narrows {
            true => Decoded::next(class, move |cx| cx.map1_low(d, &a, convert)),
            false => Decoded::next(class, move |cx| cx.map1(d, &a, convert)),
        });
    }
    let (read, write) = (reader(from, mode)?, writer(from, to, mode)?);
    Ok(Decoded::next(class, move |cx| cx.map1(d, &a, |a| write(read(a)))))
}

fn reader(from: Type, mode: Mode) -> Result<Read> {
    Ok(match from {
        Type::F32 => Box::new(move |a| {
            let x = f32::from_bits(a as u32);
            Value::Float((if mode.flush { numeric::ftz(x) } else { x }).into())
        }),
        Type::F64 => Box::new(|a| Value::Float(f64::from_bits(a))),
        Type::F16 => Box::new(|a| Value::Float(Half::F16.to_f32(a as u16).into())),
        Type::Bf16 => Box::new(|a| Value::Float(Half::Bf16.to_f32(a as u16).into())),
        from => {
            let i = int(from)?;
            Box::new(move |a| Value::Int(i.value(a)))
        }
    })
}

fn writer(from: Type, to: Type, mode: Mode) -> Result<Write> {
    let rounding = mode.rounding;
    let integral = move |x: f64| if mode.integral { to_integral(x, rounding) } else { x };
    Ok(match to {
        Type::F32 => Box::new(move |v| {
            let x = match v {
                Value::Int(v) => int_to_f32(v, rounding),
                Value::Float(x) => f64_to_f32(integral(x), rounding),
            };
            let x = if mode.flush { numeric::ftz(x) } else { x };
            let x = if mode.saturate { numeric::saturate(x) } else { x };
            x.to_bits().into()
        }),
        Type::F64 => Box::new(move |v| match v {
            Value::Int(v) => int_to_f64(v, rounding).to_bits(),
            // NaN and -0 become +0.
            Value::Float(x) if mode.saturate && (x.is_nan() || x <= 0.0) => 0,
            Value::Float(x) if mode.saturate => integral(x).min(1.0).to_bits(),
            Value::Float(x) => integral(x).to_bits(),
        }),
        Type::F16 | Type::Bf16 => {
            let kind = if to == Type::F16 { Half::F16 } else { Half::Bf16 };
            Box::new(move |v| {
                let h = match v {
                    Value::Int(v) => kind.round(int_to_odd(v), rounding),
                    Value::Float(x) => kind.round(integral(x), rounding),
                };
                let h = if mode.saturate { kind.saturate(h) } else { h };
                if mode.relu { kind.relu(h).into() } else { h.into() }
            })
        }
        to => {
            let i = int(to)?;
            let double = from == Type::F64;
            Box::new(move |v| match v {
                Value::Int(v) => i.mask(v as u64),
                Value::Float(x) => float_to_int(x, i, rounding, double),
            })
        }
    })
}
