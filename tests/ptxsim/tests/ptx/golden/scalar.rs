//! Results of single instructions.

use ptxsim::numeric::approx::Function;
use ptxsim::numeric::half::Half;
use ptxsim::numeric::tensor::Accumulation;

use super::probes::Probe;
use super::{Comparison, simulate};

/// What a result is held to.
enum Rule {
    /// The very bits.
    Exact,
    /// The documented bound.
    Near(Function),
    /// That of 16-bit floats, two to a word.
    NearHalf(Function, Half),
    /// Nothing: the rules leave it open.
    Open,
}

const FUNCTIONS: [(&str, Function); 10] = [
    ("ex2.approx", Function::Ex2),
    ("lg2.approx", Function::Lg2),
    ("rcp.approx", Function::Rcp),
    ("sqrt.approx", Function::Sqrt),
    ("rsqrt.approx", Function::Rsqrt),
    ("tanh.approx", Function::Tanh),
    ("sin.approx", Function::Sin),
    ("cos.approx", Function::Cos),
    ("div.approx", Function::Div),
    ("div.full", Function::DivFull),
];

fn rule(column: &str) -> Rule {
    let function = FUNCTIONS.iter().find(|(name, _)| column.starts_with(name));
    match (function, column.rsplit('.').next()) {
        (Some((_, function)), Some("bf16x2")) => Rule::NearHalf(*function, Half::Bf16),
        (Some((_, function)), Some("f16x2")) => Rule::NearHalf(*function, Half::F16),
        (Some((_, function)), _) => Rule::Near(*function),
        _ if column.contains(' ') || column == "elect.sync" => Rule::Open,
        _ => Rule::Exact,
    }
}

impl Rule {
    /// Whether the rules allow what the card has, where the simulator has something else.
    fn allows(&self, inputs: &[u32], flush: bool, card: u32) -> bool {
        let operand = |i: usize| f32::from_bits(inputs.get(i).copied().unwrap_or_default());
        match self {
            Self::Exact => false,
            Self::Open => true,
            Self::Near(f) => f.allows([operand(0), operand(1)], flush, f32::from_bits(card)),
            Self::NearHalf(f, kind) => [0, 16].into_iter().all(|half| {
                f.allows_half(*kind, (inputs[0] >> half) as u16, flush, (card >> half) as u16)
            }),
        }
    }
}

/// Compares column by column.
pub fn compare(probe: &Probe, card: &[u32], comparison: &mut Comparison) {
    let simulator = simulate(probe, Accumulation::Exact);
    let (words, width, row) = (probe.words(), probe.columns.len(), probe.row());
    for (column, name) in probe.columns.iter().enumerate() {
        let (rule, flush) = (rule(name), name.contains(".ftz"));
        let pairs = || card.iter().zip(&simulator).skip(column).step_by(width);
        let others = pairs().enumerate().filter(|(_, (card, simulator))| card != simulator);
        let (mut differ, mut refused, mut first) = (0, 0, None);
        for (i, (card, simulator)) in others {
            let inputs = &words[i * row..][..row];
            let text =
                || format!("{inputs:08x?} gives {card:08x}, in the simulator {simulator:08x}");
            differ += 1;
            if !rule.allows(inputs, flush, *card) {
                refused += 1;
                let failures = &mut comparison.failures;
                // Enough to see what it is.
                if refused <= 5 {
                    failures.push(format!("{} {name}: thread {i}: {}", probe.entry, text()));
                }
            }
            first.get_or_insert_with(text);
        }
        let count = pairs().len();
        let first = first.map_or(String::new(), |first| format!("; {first}"));
        let line = format!("{} {name}: {} of {count} equal", probe.entry, count - differ);
        let refused = if refused > 0 { format!(", {refused} not allowed") } else { String::new() };
        comparison.lines.push(line + &refused + &first);
    }
}
