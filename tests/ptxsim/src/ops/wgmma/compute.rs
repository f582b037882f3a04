//! The arithmetic of one warp: 16 rows of a product.

use super::{Issued, M, Product};
use crate::context::Cx;
use crate::layout::{MmaShape, wgmma_d};
use crate::numeric::tensor::{mma_tile, mma_tile_f16};
use crate::ops::mma::Element;
use crate::program::{Lanes, Src};

/// A in registers.
pub struct Fragments {
    registers: Vec<Lanes>,
    /// Lanes that hold a value.
    written: Vec<u32>,
}

impl Fragments {
    /// The registers as they are now.
    pub fn read(cx: &mut Cx<'_, '_>, sources: &[Src]) -> Self {
        let registers = sources.iter().map(|s| cx.take(s)).collect();
        let written = sources.iter().map(|s| match s {
            Src::Reg(slot) => cx.warp.written(*slot),
            Src::Imm(_) => u32::MAX,
        });
        Self { registers, written: written.collect() }
    }

    /// Values row by row, and the rows that hold values throughout.
    fn matrix(&self, product: &Product) -> (Vec<f32>, Vec<bool>) {
        let k = product.k();
        let shape = match product.element {
            Element::Tf32 => MmaShape::M16n8k8Tf32,
            Element::Half(_) => MmaShape::M16n8k16,
        };
        let sign = if product.negate[0] { -1.0 } else { 1.0 };
        let (mut values, mut defined) = (vec![0f32; M * k], vec![true; M]);
        for lane in 0..32 {
            for i in 0..M * k / 32 {
                let (row, column) = shape.a(lane, i);
                values[row * k + column] = sign * product.element.get(&self.registers, lane, i);
                let register = i / product.element.per_register();
                defined[row] &= self.written[register] >> lane & 1 != 0;
            }
        }
        (values, defined)
    }
}

/// Number of an accumulator, in a lane, within 16 rows of `n` columns.
fn place(n: usize, lane: usize, i: usize) -> usize {
    let (row, column) = wgmma_d(lane, i);
    row * n + column
}

impl Issued {
    /// Computes the warp's accumulators, from operands that are read now at the latest.
    pub fn compute(&self, cx: &mut Cx<'_, '_>) {
        let mut operation = self.operation.borrow_mut();
        operation.read(&cx.gang.blocks[cx.warp.block].shared);
        let p = &operation.product;
        let Some((a, b)) = &operation.operands else { return };
        let first = M * (cx.warp.index as usize % 4);
        let fragments = self.fragments.as_ref().map(|f| f.matrix(p));
        let (left, rows) = match (&fragments, a) {
            (Some((values, defined)), _) => (&values[..], &defined[..]),
            (None, Some(a)) => {
                (&a.values[first * p.k()..][..M * p.k()], &a.defined[first..first + M])
            }
            (None, None) => return,
        };
        let defined = Defined { rows, columns: &b.defined };
        match p.half {
            false => p.compute(cx, left, &b.values, operation.accumulate, &defined),
            true => p.compute_half(cx, left, &b.values, operation.accumulate, &defined),
        }
    }
}

/// Which rows and columns of a result hold values.
struct Defined<'a> {
    rows: &'a [bool],
    columns: &'a [bool],
}

impl Defined<'_> {
    /// Lanes whose accumulator number `i` does.
    fn lanes(&self, i: usize) -> u32 {
        (0..32).fold(0, |mask, lane| {
            let (row, column) = wgmma_d(lane, i);
            mask | u32::from(self.rows[row] && self.columns[column]) << lane
        })
    }
}

impl Product {
    fn compute(
        &self,
        cx: &mut Cx<'_, '_>,
        a: &[f32],
        b: &[f32],
        accumulate: bool,
        defined: &Defined<'_>,
    ) {
        let n = self.n;
        let mut c = vec![0f32; M * n];
        // A lane's accumulators lie as those of lane 0, counted from its first.
        let lanes: [usize; 32] = std::array::from_fn(|lane| place(n, lane, 0));
        let at = |i: usize| lanes.map(|lane| place(n, 0, i) + lane);
        if accumulate {
            for (i, slot) in self.d.iter().enumerate() {
                let v = cx.warp.register(*slot);
                at(i).iter().zip(v).for_each(|(at, v)| c[*at] = f32::from_bits(*v as u32));
            }
        }
        mma_tile((M, n, self.k()), a, b, &mut c, cx.grid.options.accumulation);
        for (i, slot) in self.d.iter().enumerate() {
            let held = if accumulate { cx.warp.written(*slot) } else { u32::MAX };
            let value = at(i).map(|at| c[at].to_bits().into());
            cx.warp.set_accumulator(*slot, held & defined.lanes(i), &value);
        }
    }

    /// The same for f16, neighbours in a row packed into one register.
    fn compute_half(
        &self,
        cx: &mut Cx<'_, '_>,
        a: &[f32],
        b: &[f32],
        accumulate: bool,
        defined: &Defined<'_>,
    ) {
        let n = self.n;
        let mut c = vec![0u16; M * n];
        let at = |r: usize| std::array::from_fn::<_, 32, _>(|lane| place(n, lane, 2 * r));
        if accumulate {
            for (r, slot) in self.d.iter().enumerate() {
                let v = cx.warp.register(*slot);
                for (at, v) in at(r).iter().zip(v) {
                    (c[*at], c[*at + 1]) = (*v as u16, (*v >> 16) as u16);
                }
            }
        }
        mma_tile_f16((M, n, self.k()), a, b, &mut c, cx.grid.options.accumulation);
        for (r, slot) in self.d.iter().enumerate() {
            let held = if accumulate { cx.warp.written(*slot) } else { u32::MAX };
            let defined = defined.lanes(2 * r) & defined.lanes(2 * r + 1);
            let pair = |at: usize| u64::from(c[at]) | u64::from(c[at + 1]) << 16;
            cx.warp.set_accumulator(*slot, held & defined, &at(r).map(pair));
        }
    }
}
