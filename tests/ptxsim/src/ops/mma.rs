//! mma.sync: matrix products of one warp, operands and accumulators in registers.

use crate::ast::Type;
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::layout::MmaShape;
use crate::numeric::convert::tf32_operand;
use crate::numeric::half::Half;
use crate::numeric::tensor::{mma_tile, mma_tile_f16};
use crate::program::{Decoded, Dst, Flow, Src};

const M: usize = 16;
const N: usize = 8;

/// Elements of A and B.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Element {
    /// 16 bits, two to a register.
    Half(Half),
    /// 19 bits of 32.
    Tf32,
}

impl Element {
    /// Elements in a register.
    pub fn per_register(self) -> usize {
        if self == Self::Tf32 { 1 } else { 2 }
    }

    /// Element `i` of a lane's registers.
    pub fn get(self, registers: &[crate::program::Lanes], lane: usize, i: usize) -> f32 {
        match self {
            Self::Half(kind) => kind.to_f32((registers[i / 2][lane] >> (16 * (i % 2))) as u16),
            Self::Tf32 => tf32_operand(registers[i][lane] as u32),
        }
    }
}

/// Takes `.bf16.bf16`, `.f16.f16` or `.tf32.tf32`; `tf32` is no type of PTX registers.
pub fn element(op: &mut Opcode<'_>, types: &[Type]) -> Result<Element> {
    if op.take("tf32") {
        op.expect("tf32")?;
        return Ok(Element::Tf32);
    }
    match types {
        [Type::F16, Type::F16] => Ok(Element::Half(Half::F16)),
        [Type::Bf16, Type::Bf16] => Ok(Element::Half(Half::Bf16)),
        types => Err(format!("operands of {types:?} are not supported")),
    }
}

/// A decoded product.
struct Product {
    shape: MmaShape,
    element: Element,
    /// f16 accumulators, two to a register.
    half: bool,
    d: Vec<Dst>,
    a: Vec<Src>,
    b: Vec<Src>,
    c: Vec<Src>,
}

/// mma.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    for m in ["sync", "aligned", "row", "col"] {
        op.expect(m)?;
    }
    let shapes = [("m16n8k16", 16), ("m16n8k8", 8), ("m16n8k4", 4)];
    let k = op.one_of(&shapes).ok_or("this shape is not supported")?;
    let types = op.types();
    let (accumulator, operands) = match types[..] {
        [d, a, b, c] if d == c => (d, vec![a, b]),
        [d, c] if d == c => (d, vec![]),
        _ => return Err("the types are not supported".into()),
    };
    let element = element(op, &operands)?;
    let shape = match (k, element) {
        (16, Element::Half(_)) => MmaShape::M16n8k16,
        (8, Element::Half(_)) => MmaShape::M16n8k8,
        (8, Element::Tf32) => MmaShape::M16n8k8Tf32,
        _ => return Err("this shape is not supported for these types".into()),
    };
    let half = match (accumulator, element) {
        (Type::F32, _) => false,
        (Type::F16, Element::Half(Half::F16)) => true,
        (ty, _) => return Err(format!("accumulators of .{ty}")),
    };
    let [d, a, b, c] = op.operands()?;
    let ty = if half { Type::B32 } else { Type::F32 };
    let bits = Type::B32;
    let product = Product {
        shape,
        element,
        half,
        d: env.dsts(d, ty)?,
        a: env.srcs(a, bits)?,
        b: env.srcs(b, bits)?,
        c: env.srcs(c, ty)?,
    };
    let per = element.per_register();
    let accumulators = if half { 2 } else { 4 };
    let expected = [accumulators, M * k / 32 / per, N * k / 32 / per, accumulators];
    let given = [product.d.len(), product.a.len(), product.b.len(), product.c.len()];
    if given != expected {
        return Err(format!("vectors of {given:?} registers, {expected:?} expected"));
    }
    Ok(Decoded::flow(Class::Tensor, move |cx| {
        if let Some(flow) = cx.converged() {
            return flow;
        }
        product.execute(cx);
        Flow::Next
    }))
}

impl Product {
    fn execute(&self, cx: &mut Cx<'_, '_>) {
        let k = self.shape.k();
        let read =
            |cx: &mut Cx<'_, '_>, s: &[Src]| -> Vec<_> { s.iter().map(|s| cx.read(s)).collect() };
        let (a, b, c) = (read(cx, &self.a), read(cx, &self.b), read(cx, &self.c));
        let (mut x, mut y) = ([0f32; M * 16], [0f32; N * 16]);
        let (in_a, in_b) = (M * k / 32, N * k / 32);
        for lane in 0..32 {
            for i in 0..in_a {
                let (row, column) = self.shape.a(lane, i);
                x[row * k + column] = self.element.get(&a, lane, i);
            }
            for i in 0..in_b {
                let (row, column) = self.shape.b(lane, i);
                y[column * k + row] = self.element.get(&b, lane, i);
            }
        }
        cx.gang.counters.add_flops(cx.pc, (2 * M * N * k) as u64);
        let size = (M, N, k);
        if self.half {
            return self.execute_half(cx, &x, &y, &c);
        }
        let mut z = [0f32; M * N];
        for lane in 0..32 {
            for (i, c) in c.iter().enumerate() {
                let (row, column) = self.shape.c(lane, i);
                z[row * N + column] = f32::from_bits(c[lane] as u32);
            }
        }
        mma_tile(size, &x, &y, &mut z, cx.grid.options.accumulation);
        for (i, d) in self.d.iter().enumerate() {
            let value = |lane| {
                let (row, column) = self.shape.c(lane, i);
                u64::from(z[row * N + column].to_bits())
            };
            cx.write(*d, &std::array::from_fn(value));
        }
    }

    fn execute_half(&self, cx: &mut Cx<'_, '_>, x: &[f32], y: &[f32], c: &[crate::program::Lanes]) {
        let at = |lane, i| {
            let (row, column) = self.shape.c(lane, i);
            row * N + column
        };
        let mut z = [0u16; M * N];
        for lane in 0..32 {
            for i in 0..4 {
                z[at(lane, i)] = (c[i / 2][lane] >> (16 * (i % 2))) as u16;
            }
        }
        mma_tile_f16((M, N, self.shape.k()), x, y, &mut z, cx.grid.options.accumulation);
        for (r, d) in self.d.iter().enumerate() {
            let value =
                |lane| u64::from(z[at(lane, 2 * r)]) | u64::from(z[at(lane, 2 * r + 1)]) << 16;
            cx.write(*d, &std::array::from_fn(value));
        }
    }
}
