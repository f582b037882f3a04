//! tensormap.replace, tensormap.cp_fenceproxy: tensor maps written by the device.

use crate::access::{Mode, Window};
use crate::ast::Operand;
use crate::clock::{Reach, Scope};
use crate::context::{Cx, lanes};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::ops::load_store::{scope, window};
use crate::program::{Address, Decoded, Flow, Src};
use crate::tensor_map::ENCODED_BYTES;
use crate::tensor_map::replace::{Field, replace};

/// Bytes of a tensor map, and its alignment.
const BYTES: u32 = ENCODED_BYTES as u32;
const ALIGN: u32 = 64;

/// tensormap.*
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    if op.take("cp_fenceproxy") {
        return copy(op, env);
    }
    op.expect("replace")?;
    op.expect("tile")?;
    op.expect("b1024")?;
    let ty = op.ty()?;
    let window = window(op).unwrap_or(Window::Generic);
    type Ordinal = fn(usize) -> Field;
    let ordinals: [(&str, Ordinal); 4] = [
        ("box_dim", Field::BoxDim),
        ("global_dim", Field::GlobalDim),
        ("global_stride", Field::GlobalStride),
        ("element_stride", Field::ElementStride),
    ];
    let plain = [
        ("global_address", Field::GlobalAddress),
        ("rank", Field::Rank),
        ("elemtype", Field::ElementType),
        ("interleave_layout", Field::Interleave),
        ("swizzle_mode", Field::Swizzle),
        ("fill_mode", Field::Fill),
    ];
    let (a, field, value) = match (op.one_of(&ordinals), op.instr.operands.as_slice()) {
        (Some(field), [a, Operand::Int(d), value]) => (a, field(*d as usize), value),
        (None, [a, value]) => (a, op.one_of(&plain).ok_or("the field is missing")?, value),
        (_, o) => return Err(format!("{} operands", o.len())),
    };
    let (a, value) = (env.address(a)?, env.src(value, ty)?);
    Ok(Decoded::next(Class::Async, move |cx| change(cx, &a, window, field, &value)))
}

fn change(cx: &mut Cx<'_, '_>, a: &Address, window: Window, field: Field, value: &Src) {
    let (at, values) = (cx.addresses(a), cx.read(value));
    for l in lanes(cx.mask) {
        let Some(region) = cx.locate(l as u32, window, at[l], BYTES, ALIGN) else { continue };
        cx.touch(region, BYTES, Mode::Update, cx.own(l, None), "tensormap.replace");
        let mut bytes = [0; ENCODED_BYTES];
        cx.copy_out(l, region, &mut bytes);
        match replace(&mut bytes, field, values[l]) {
            Ok(()) => cx.copy_in(l, region, &bytes),
            Err(error) => cx.report_lane(Kind::InvalidOperand, l as u32, error.to_string()),
        }
    }
}

/// Copies a map from shared to global memory by a whole warp, and releases it to those who acquire
/// it there by fence.proxy.tensormap.
fn copy(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    for m in ["global", "shared::cta", "tensormap::generic", "release", "sync", "aligned"] {
        op.expect(m)?;
    }
    let scope = scope(op).ok_or("the scope is missing")?;
    let [to, from, Operand::Int(bytes)] = op.operands()? else {
        return Err("the number of bytes is no constant".into());
    };
    if *bytes != u64::from(BYTES) {
        return Err(format!("{bytes} bytes; a tensor map has {BYTES}"));
    }
    let (to, from) = (env.address(to)?, env.address(from)?);
    Ok(Decoded::flow(Class::Async, move |cx| {
        if let Some(flow) = cx.converged() {
            return flow;
        }
        let (to, from) = (cx.addresses(&to), cx.addresses(&from));
        let leader = cx.mask.trailing_zeros() as usize & 31;
        cx.warp.clock.sync_lanes(cx.mask);
        let source = cx.locate(leader as u32, Window::Shared, from[leader], BYTES, ALIGN);
        let target = cx.locate(leader as u32, Window::Global, to[leader], BYTES, ALIGN);
        if let (Some(source), Some(target)) = (source, target) {
            let own = |cx: &Cx<'_, '_>, strong| cx.own(leader, strong);
            cx.touch(source, BYTES, Mode::Read, own(cx, None), "tensormap.cp_fenceproxy from");
            let actor = own(cx, Some(scope));
            cx.touch(target, BYTES, Mode::Write, actor, "tensormap.cp_fenceproxy to");
            let mut bytes = [0; ENCODED_BYTES];
            cx.copy_out(leader, source, &mut bytes);
            cx.publish(leader, Window::Global, to[leader], scope, true, false);
            cx.copy_in(leader, target, &bytes);
        }
        cx.warp.clock.sync_lanes(cx.mask);
        Flow::Next
    }))
}

/// fence.proxy.tensormap::generic: `.acquire` learns what was released with the map.
pub fn fence(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let acquires = op.take("acquire");
    if !acquires {
        op.expect("release")?;
    }
    let scope: Scope = scope(op).ok_or("the scope is missing")?;
    if !acquires {
        let [] = op.operands()?;
        let reach = Reach::of(scope);
        return Ok(Decoded::next(Class::Barrier, move |cx| cx.warp.clock.fence(cx.mask, reach)));
    }
    let [a, Operand::Int(bytes)] = op.operands()? else {
        return Err("the number of bytes is no constant".into());
    };
    if *bytes != u64::from(BYTES) {
        return Err(format!("{bytes} bytes; a tensor map has {BYTES}"));
    }
    let a = env.address(a)?;
    Ok(Decoded::next(Class::Barrier, move |cx| {
        let at = cx.addresses(&a);
        for l in lanes(cx.mask) {
            cx.observe(l, Window::Generic, at[l], scope, true);
        }
    }))
}
