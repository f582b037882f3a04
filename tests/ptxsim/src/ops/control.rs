//! Branches, returns, ends, sleeping.

use crate::ast::Type;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::program::{Decoded, Flow, Waiting};
use crate::scope::fails_assertion;

/// bra, ret, exit, call of a failed assertion, trap, brkpt, nanosleep, pmevent.
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
        // All other calls have been expanded.
        "call" if fails_assertion(op.instr) => Ok(Decoded::flow(Class::Control, |cx| {
            cx.fault(Kind::Trap, "an assertion of the kernel fails".into())
        })),
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
