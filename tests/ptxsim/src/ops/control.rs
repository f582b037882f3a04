//! Branches, returns, ends, sleeping.

use crate::access::Window;
use crate::ast::{Operand, Type};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::program::{Decoded, Flow, Waiting};
use crate::scope::{SystemCall, system_call};

/// bra, ret, exit, calls of the system, trap, brkpt, nanosleep, pmevent.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    op.take("uni");
    match op.root() {
        "bra" => {
            let [target] = op.operands()?;
            let target = env.label(target)?;
            Ok(Decoded::flow(Class::Control, move |_| Flow::Jump(target)))
        }
        "ret" => {
            let [] = op.operands()?;
            Ok(match env.return_target() {
                Some(pc) => Decoded::flow(Class::Control, move |_| Flow::Jump(pc)),
                None => Decoded::flow(Class::Control, |_| Flow::Exit),
            })
        }
        "exit" => {
            let [] = op.operands()?;
            Ok(Decoded::flow(Class::Control, |_| Flow::Exit))
        }
        "nanosleep" => {
            op.expect("u32")?;
            let [time] = op.operands()?;
            let time = env.src(time, Type::U32)?;
            Ok(Decoded::flow(Class::Control, move |cx| {
                cx.check(&time);
                Flow::Spin(Waiting::Poll)
            }))
        }
        "call" => system(op, env),
        "trap" | "brkpt" => {
            let [] = op.operands()?;
            Ok(Decoded::flow(Class::Control, |cx| cx.fault(Kind::Trap, "trap executed".into())))
        }
        "pmevent" => {
            let [event] = op.operands()?;
            env.src(event, Type::U32)?;
            Ok(Decoded::next(Class::Control, |_| {}))
        }
        root => Err(format!("unknown opcode {root}")),
    }
}

/// Calls of functions of the system; all others have been expanded.
fn system(op: &Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match system_call(op.instr) {
        None => Err("operands of call not understood".into()),
        Some(SystemCall::AssertFail) => Ok(Decoded::flow(Class::Control, |cx| {
            cx.fault(Kind::Trap, "an assertion of the kernel fails".into())
        })),
        // Prints nothing, and returns so many characters.
        Some(SystemCall::Printf) => {
            let [Operand::List(results), ..] = op.instr.operands.as_slice() else {
                return Ok(Decoded::next(Class::Control, |_| {}));
            };
            let [result] = results.as_slice() else {
                return Err("vprintf returns one value".into());
            };
            let result = env.src(result, Type::B64)?;
            Ok(Decoded::next(Class::Control, move |cx| {
                let at = cx.read(&result);
                cx.store(Window::Local, 4, &at, &[0; 32], None);
            }))
        }
    }
}
