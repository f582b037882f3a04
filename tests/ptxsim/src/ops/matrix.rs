//! ldmatrix, stmatrix, movmatrix: 8 × 8 matrices of 16-bit elements, a row per lane.

use crate::access::{Actor, Mode, Window};
use crate::ast::{Operand, Type};
use crate::bank::matrix_phases;
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::layout::matrix_element;
use crate::ops::load_store::window;
use crate::program::{Address, Decoded, Dst, Flow, Lanes, Src};
use crate::shadow::Proxy;

/// Bytes of a row.
const ROW: u32 = 16;

/// An 8 × 8 matrix.
type Matrix = [[u16; 8]; 8];

/// ldmatrix, stmatrix, movmatrix.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    op.expect("sync")?;
    op.expect("aligned")?;
    op.expect("m8n8")?;
    let trans = op.take("trans");
    op.expect("b16")?;
    if op.root() == "movmatrix" {
        return transpose(op, env, trans);
    }
    let number = op.one_of(&[("x1", 1), ("x2", 2), ("x4", 4)]).ok_or("the number is missing")?;
    let window = window(op).unwrap_or(Window::Generic);
    if !matches!(window, Window::Shared | Window::Generic) {
        return Err("only shared memory is possible".into());
    }
    let [first, second] = op.operands()?;
    let count = |o: &Operand| if let Operand::Vector(v) = o { v.len() } else { 1 };
    if op.root() == "ldmatrix" {
        let (d, a) = (env.dsts(first, Type::B32)?, env.address(second)?);
        if count(first) != number {
            return Err(format!("{} registers for x{number}", count(first)));
        }
        return Ok(Decoded::flow(Class::SharedLoad, move |cx| load(cx, window, &a, &d, trans)));
    }
    let (a, s) = (env.address(first)?, env.srcs(second, Type::B32)?);
    if count(second) != number {
        return Err(format!("{} registers for x{number}", count(second)));
    }
    Ok(Decoded::flow(Class::SharedStore, move |cx| store(cx, window, &a, &s, trans)))
}

/// Both halves of each lane's register from a matrix.
fn gather(m: &Matrix, trans: bool) -> Lanes {
    std::array::from_fn(|lane| {
        let at = |high| {
            let (row, column) = matrix_element(lane, high, trans);
            u64::from(m[row][column])
        };
        at(false) | at(true) << 16
    })
}

/// A matrix from both halves of each lane's register.
fn scatter(registers: &Lanes, trans: bool) -> Matrix {
    let mut m = Matrix::default();
    for (lane, v) in registers.iter().enumerate() {
        for high in [false, true] {
            let (row, column) = matrix_element(lane, high, trans);
            m[row][column] = (v >> (16 * u32::from(high))) as u16;
        }
    }
    m
}

/// The rows of matrix `j`: addresses of lanes 8j to 8j + 7.
fn rows(at: &Lanes, j: usize) -> [u64; 8] {
    std::array::from_fn(|r| at[8 * j + r])
}

fn load(cx: &mut Cx<'_, '_>, window: Window, a: &Address, d: &[Dst], trans: bool) -> Flow {
    if let Some(flow) = cx.converged() {
        return flow;
    }
    let at = cx.addresses(a);
    let epoch = cx.warp.clock.epoch(cx.mask);
    for (j, d) in d.iter().enumerate() {
        let rows = rows(&at, j);
        count(cx, &rows);
        let mut m = Matrix::default();
        for (r, (address, row)) in rows.iter().zip(&mut m).enumerate() {
            let lane = (8 * j + r) as u32;
            let Some(region) = cx.locate(lane, window, *address, ROW, ROW) else { continue };
            let actor = Actor { lane, epoch, proxy: Proxy::Generic, strong: None };
            cx.touch(region, ROW, Mode::Read, actor, "ldmatrix");
            let mut bytes = [0; ROW as usize];
            cx.copy_out(lane as usize, region, &mut bytes);
            *row = std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
        }
        cx.write(*d, &gather(&m, trans));
    }
    Flow::Next
}

fn store(cx: &mut Cx<'_, '_>, window: Window, a: &Address, s: &[Src], trans: bool) -> Flow {
    if let Some(flow) = cx.converged() {
        return flow;
    }
    let at = cx.addresses(a);
    let epoch = cx.warp.clock.epoch(cx.mask);
    for (j, s) in s.iter().enumerate() {
        let rows = rows(&at, j);
        count(cx, &rows);
        let m = scatter(&cx.read(s), trans);
        for (r, (address, row)) in rows.iter().zip(&m).enumerate() {
            let lane = (8 * j + r) as u32;
            let Some(region) = cx.locate(lane, window, *address, ROW, ROW) else { continue };
            let actor = Actor { lane, epoch, proxy: Proxy::Generic, strong: None };
            cx.touch(region, ROW, Mode::Write, actor, "stmatrix");
            let mut bytes = [0; ROW as usize];
            bytes
                .chunks_exact_mut(2)
                .zip(row)
                .for_each(|(b, v)| b.copy_from_slice(&v.to_le_bytes()));
            cx.copy_in(lane as usize, region, &bytes);
        }
    }
    Flow::Next
}

fn count(cx: &mut Cx<'_, '_>, rows: &[u64; 8]) {
    let phases = matrix_phases(&rows.map(|r| r as u32));
    cx.gang.counters.add_phases(cx.pc, phases);
}

fn transpose(op: &mut Opcode<'_>, env: &Env<'_>, trans: bool) -> Result<Decoded> {
    if !trans {
        return Err(".trans is missing".into());
    }
    let [d, a] = op.operands()?;
    let (d, a) = (env.dst(d, Type::B32)?, env.src(a, Type::B32)?);
    Ok(Decoded::flow(Class::Shuffle, move |cx| {
        if let Some(flow) = cx.converged() {
            return flow;
        }
        let m = scatter(&cx.read(&a), false);
        cx.write(d, &gather(&m, true));
        Flow::Next
    }))
}
