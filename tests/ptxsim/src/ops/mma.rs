//! mma.sync: matrix products of one warp, operands and accumulators in registers.

use crate::ast::Type;
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::layout::MmaShape;
use crate::numeric::convert::tf32_operand;
use crate::numeric::half::Half;
use crate::numeric::tensor::{mma_tile, mma_tile_f16};
use crate::program::{Decoded, Dst, Flow, Lanes, Src};

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
        let per = self.per_register();
        self.value(registers[i / per][lane], i % per)
    }

    /// Element `i` of one register.
    #[inline]
    fn value(self, register: u64, i: usize) -> f32 {
        match self {
            Self::Half(kind) => kind.to_f32((register >> (16 * i)) as u16),
            Self::Tf32 => tf32_operand(register as u32),
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

/// Where each element of each lane lies in a row-major matrix, by element and lane.
type Places = Vec<[u8; 32]>;

fn places(elements: usize, columns: usize, at: impl Fn(usize, usize) -> (usize, usize)) -> Places {
    let place = |lane, i| {
        let (row, column) = at(lane, i);
        (row * columns + column) as u8
    };
    (0..elements).map(|i| std::array::from_fn(|lane| place(lane, i))).collect()
}

/// A matrix: a byte reaches every element.
type Tile<T> = [T; 256];

/// One element of each lane, in its place.
fn fill(out: &mut Tile<f32>, places: &[u8; 32], v: &Lanes, value: impl Fn(u64) -> f32) {
    for (place, v) in places.iter().zip(v) {
        out[usize::from(*place)] = value(*v);
    }
}

/// A decoded product.
struct Product {
    shape: MmaShape,
    element: Element,
    a_places: Places,
    b_places: Places,
    c_places: Places,
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
        a_places: places(M * k / 32, k, |lane, i| shape.a(lane, i)),
        // Column by column.
        b_places: places(N * k / 32, k, |lane, i| {
            let (row, column) = shape.b(lane, i);
            (column, row)
        }),
        c_places: places(M * N / 32, N, |lane, i| shape.c(lane, i)),
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
        let (mut x, mut y) = ([0f32; 256], [0f32; 256]);
        self.gather(cx, &self.a, &self.a_places, &mut x);
        self.gather(cx, &self.b, &self.b_places, &mut y);
        cx.gang.counters.add_flops(cx.pc, (2 * M * N * k) as u64);
        if self.half {
            return self.execute_half(cx, &x, &y);
        }
        let mut z = [0f32; 256];
        for (c, places) in self.c.iter().zip(&self.c_places) {
            let c = cx.read(c);
            (0..32).for_each(|l| z[usize::from(places[l])] = f32::from_bits(c[l] as u32));
        }
        mma_tile((M, N, k), &x, &y, &mut z, cx.grid.options.accumulation);
        for (d, places) in self.d.iter().zip(&self.c_places) {
            cx.write(*d, &std::array::from_fn(|l| z[usize::from(places[l])].to_bits().into()));
        }
    }

    /// The values of a fragment, in their places.
    fn gather(&self, cx: &mut Cx<'_, '_>, s: &[Src], places: &Places, out: &mut Tile<f32>) {
        let per = self.element.per_register();
        for (s, places) in s.iter().zip(places.chunks(per)) {
            let v = cx.read(s);
            for (i, places) in places.iter().enumerate() {
                // A loop for each kind, so that none is chosen inside.
                let half = |x: u64| (x >> (16 * i)) as u16;
                match self.element {
                    Element::Half(Half::Bf16) => {
                        fill(out, places, &v, |x| Half::Bf16.to_f32(half(x)))
                    }
                    Element::Half(Half::F16) => {
                        fill(out, places, &v, |x| Half::F16.to_f32(half(x)))
                    }
                    Element::Tf32 => fill(out, places, &v, |x| tf32_operand(x as u32)),
                }
            }
        }
    }

    fn execute_half(&self, cx: &mut Cx<'_, '_>, x: &Tile<f32>, y: &Tile<f32>) {
        let mut z = [0u16; 256];
        for (c, places) in self.c.iter().zip(self.c_places.chunks(2)) {
            let c = cx.read(c);
            for (i, places) in places.iter().enumerate() {
                (0..32).for_each(|l| z[usize::from(places[l])] = (c[l] >> (16 * i)) as u16);
            }
        }
        mma_tile_f16((M, N, self.shape.k()), x, y, &mut z, cx.grid.options.accumulation);
        for (d, places) in self.d.iter().zip(self.c_places.chunks(2)) {
            let half = |l: usize, i: usize| u64::from(z[usize::from(places[i][l])]);
            cx.write(*d, &std::array::from_fn(|l| half(l, 0) | half(l, 1) << 16));
        }
    }
}
