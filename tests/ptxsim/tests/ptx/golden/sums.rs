//! Sums of the tensor cores: within what cutting aligned products may lose, and which order and which
//! cut explain them.

use ptxsim::numeric::convert::tf32_operand;
use ptxsim::numeric::half::Half;
use ptxsim::numeric::tensor::Accumulation;
use ptxsim::numeric::{Rounding, f64_to_f32};

use super::probes::Probe;
use super::probes::tensor::{CLASSES, Class, Element, N, Tensor};
use super::{Comparison, simulate};

/// A product or c, with the exponent that aligns it: for a product the sum of its factors', so that
/// the significand may be anything below 4.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    pub value: f64,
    pub exponent: i32,
}

/// Format of a sum.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sum {
    F16,
    F32,
}

impl Sum {
    fn value(self, bits: u32) -> f64 {
        match self {
            Self::F16 => Half::F16.to_f32(bits as u16).into(),
            Self::F32 => f32::from_bits(bits).into(),
        }
    }

    fn round(self, x: f64, rounding: Rounding) -> u32 {
        match self {
            Self::F16 => Half::F16.round(x, rounding).into(),
            Self::F32 => f64_to_f32(x, rounding).to_bits(),
        }
    }

    /// Mantissa bits, and the power of two beyond the largest number.
    fn limits(self) -> (i32, f64) {
        match self {
            Self::F16 => (10, 2f64.powi(16)),
            Self::F32 => (23, 2f64.powi(128)),
        }
    }
}

/// A way to sum that hardware may have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Model {
    /// Products added at a time, by increasing k.
    pub group: usize,
    /// Terms are cut this many bits below the last bit of an f32 with the largest one's exponent.
    pub extra: i32,
    /// How the sum is rounded.
    pub rounding: Rounding,
    /// Whether the sum so far is one of the terms, or is added to their sum.
    pub aligned: bool,
    /// Whether only the last sum is rounded, or every group's.
    pub once: bool,
}

impl Model {
    /// Those that can be told apart.
    fn all(k: usize) -> Vec<Self> {
        let mut models = vec![];
        for group in [4, 8, 16].into_iter().filter(|group| *group <= k) {
            for extra in -1..=8 {
                for rounding in [Rounding::Zero, Rounding::Nearest] {
                    for aligned in [true, false] {
                        let model = Self { group, extra, rounding, aligned, once: false };
                        models.push(model);
                        models.extend((group < k).then_some(Self { once: true, ..model }));
                    }
                }
            }
        }
        models
    }

    pub fn describe(self) -> String {
        let Self { group, extra, .. } = self;
        let c = if self.aligned { "c among them" } else { "c added to their sum" };
        let rounding = if self.rounding == Rounding::Zero { "cut" } else { "rounded" };
        let once = if self.once { " at the end" } else { "" };
        format!("{group} products at a time, {c}, {extra} extra bits, {rounding}{once}")
    }

    /// Bits of the sum.
    pub fn sum(self, products: &[Term], c: Term, format: Sum) -> u32 {
        let mut terms = products.iter().chain([&c]);
        if terms.any(|term| !term.value.is_finite()) {
            let sum = products.iter().fold(c.value, |sum, term| sum + term.value);
            return format.round(sum, self.rounding);
        }
        let mut so_far = c;
        for group in products.chunks(self.group) {
            let sum = match self.aligned {
                true => self.cut(&[group, &[so_far]].concat()),
                false => self.cut(group) + so_far.value,
            };
            let rounded = || format.value(format.round(sum, self.rounding));
            so_far = Term::new(if self.once { sum } else { rounded() }, -126);
        }
        format.round(so_far.value, self.rounding)
    }

    /// Terms cut below the same bit, and added; that is exact.
    fn cut(self, terms: &[Term]) -> f64 {
        let exponents = terms.iter().filter(|t| t.value != 0.0).map(|t| t.exponent);
        let unit = exponents.max().map_or(1.0, |largest| 2f64.powi(largest - 23 - self.extra));
        // Zeros keep their sign.
        terms.iter().map(|t| (t.value / unit).trunc() * unit).fold(-0.0, |sum, term| sum + term)
    }
}

impl Term {
    /// A number of a format whose least normal number has the exponent `least`.
    fn new(value: f64, least: i32) -> Self {
        let exponent = (value.abs().to_bits() >> 52) as i32 - 1023;
        Self { value, exponent: exponent.max(least) }
    }

    fn product(self, other: Self) -> Self {
        Self { value: self.value * other.value, exponent: self.exponent + other.exponent }
    }
}

/// One element of d: its terms, and the bits that the card and the simulator have.
struct Case {
    class: Class,
    products: Vec<Term>,
    c: Term,
    card: u32,
    exact: u32,
    chain: u32,
}

fn cases(probe: &Probe, tensor: Tensor, card: &[u32]) -> Vec<Case> {
    let [exact, chain] = [Accumulation::Exact, Accumulation::Chain].map(|a| simulate(probe, a));
    let (format, blocks) = (format(tensor), probe.blocks as usize);
    let results = |words: &[u32], block: usize| {
        let size = words.len() / blocks;
        tensor.results(&words[block * size..][..size])
    };
    let words = probe.words();
    let inputs = words.chunks(words.len() / blocks).enumerate();
    inputs
        .flat_map(|(block, words)| {
            let [a, b, c] = tensor.operands(words);
            let k = tensor.shape()[2];
            let [a, b] =
                [a, b].map(|x| x.into_iter().map(|x| factor(tensor, x)).collect::<Vec<_>>());
            let of = [card, &exact, &chain].map(|words| results(words, block));
            (0..c.len())
                .map(|i| {
                    let pairs = a[i / N * k..][..k].iter().zip(&b[i % N * k..][..k]);
                    let products = pairs.map(|(a, b)| a.product(*b)).collect();
                    let least = if format == Sum::F16 { -14 } else { -126 };
                    let c = Term::new(format.value(c[i]), least);
                    let [card, exact, chain] = [0, 1, 2].map(|which| of[which][i]);
                    Case { class: Class::of(block), products, c, card, exact, chain }
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

fn format(tensor: Tensor) -> Sum {
    if tensor.half { Sum::F16 } else { Sum::F32 }
}

fn factor(tensor: Tensor, bits: u32) -> Term {
    match tensor.element {
        Element::F16 => Term::new(Half::F16.to_f32(bits as u16).into(), -14),
        Element::Bf16 => Term::new(Half::Bf16.to_f32(bits as u16).into(), -126),
        Element::Tf32 => Term::new(tf32_operand(bits).into(), -126),
    }
}

impl Case {
    /// Whether the card's result is what exact products, cut and added in any order, may give.
    fn allowed(&self, format: Sum) -> bool {
        let (mantissa, beyond) = format.limits();
        let [card, exact, least] = [self.card, self.exact, 1].map(|bits| format.value(bits));
        let terms = || self.products.iter().chain([&self.c]).filter(|t| t.value != 0.0);
        // A subnormal factor may be aligned as it is.
        let size: f64 = terms().map(|t| t.value.abs().max(2f64.powi(t.exponent))).sum();
        if terms().any(|t| !t.value.is_finite()) || card.is_nan() {
            return card == exact || card.is_nan() && exact.is_nan();
        }
        if size >= beyond {
            return true; // a sum on the way may overflow
        }
        // No order and no cut loses anything where all terms are multiples of the last bit of
        // whatever the sum may be on the way.
        let last = 2f64.powi(size.log2().floor() as i32 - mantissa).max(least);
        if terms().all(|t| (t.value / last).fract() == 0.0) {
            return card == exact;
        }
        // Each term is cut once, the sum on the way not more often than twice for four products.
        let k = self.products.len() as f64;
        let cuts = 2.0 * k * 2f64.powi(-23) + k / 4.0 * 2f64.powi(-mantissa);
        let clamped = |x: f64| x.clamp(-beyond, beyond);
        (clamped(card) - clamped(exact)).abs() <= size * cuts + k * least
    }

    /// NaN stands for any NaN: no rule says which.
    fn card_has(&self, bits: u32, format: Sum) -> bool {
        let nan = |bits| format.value(bits).is_nan();
        self.card == bits || nan(self.card) && nan(bits)
    }
}

/// The models that explain most, and what they leave.
fn explanation(cases: &[Case], format: Sum) -> String {
    let unexplained = |model: Model| {
        let other = move |c: &&Case| !c.card_has(model.sum(&c.products, c.c, format), format);
        cases.iter().filter(other).collect::<Vec<_>>()
    };
    let k = cases.first().map_or(0, |c| c.products.len());
    let models: Vec<_> = Model::all(k).into_iter().map(|m| (m, unexplained(m))).collect();
    let least = models.iter().map(|(_, left)| left.len()).min().unwrap_or_default();
    let best: Vec<_> = models.into_iter().filter(|(_, left)| left.len() == least).collect();
    let names: Vec<_> = best.iter().take(3).map(|(m, _)| m.describe()).collect();
    let others = match best.len() - names.len() {
        0 => String::new(),
        n => format!("; or {n} others"),
    };
    let which = match least {
        0 => "explained by".into(),
        _ => format!("{least} left unexplained ({}) by", by_class(&best[0].1)),
    };
    format!("{which}: {}{others}", names.join("; or "))
}

fn by_class(cases: &[&Case]) -> String {
    let count = |class| cases.iter().filter(|c| c.class == class).count();
    let counts = CLASSES.map(|class| (class, count(class))).into_iter().filter(|c| c.1 > 0);
    counts.map(|(class, n)| format!("{class:?} {n}")).collect::<Vec<_>>().join(", ")
}

/// What a device that sums like a model would write.
pub fn imitate(probe: &Probe, tensor: Tensor, model: Model) -> Vec<u32> {
    let cases = cases(probe, tensor, &vec![0; probe.results()]);
    let d: Vec<u32> = cases.iter().map(|c| model.sum(&c.products, c.c, format(tensor))).collect();
    d.chunks(d.len() / probe.blocks as usize).flat_map(|d| tensor.rows(d)).collect()
}

/// Compares the sums of a probe.
pub fn compare(probe: &Probe, tensor: Tensor, card: &[u32], comparison: &mut Comparison) {
    let (cases, format) = (cases(probe, tensor, card), format(tensor));
    let equal = |bits: fn(&Case) -> u32| cases.iter().filter(|c| c.card == bits(c)).count();
    let (exact, chain) = (equal(|c| c.exact), equal(|c| c.chain));
    let explanation = explanation(&cases, format);
    let entry = probe.entry;
    comparison.lines.push(format!(
        "{entry}: of {} sums {exact} equal as Exact, {chain} as Chain; {explanation}",
        cases.len()
    ));
    let different: Vec<_> = cases.iter().filter(|c| c.card != c.exact).collect();
    if !different.is_empty() {
        comparison.lines.push(format!("{entry}: other than Exact: {}", by_class(&different)));
    }
    for class in CLASSES {
        let refused = cases.iter().filter(|c| c.class == class && !c.allowed(format));
        let refused: Vec<_> = refused.collect();
        if let Some(Case { card, exact, products, c, .. }) = refused.first() {
            let count = refused.len();
            let products: Vec<_> = products.iter().map(|t| t.value).collect();
            comparison.failures.push(format!(
                "{entry}: {count} sums of class {class:?} out of bounds; the first is {card:08x}, in \
                 the simulator {exact:08x}, of c = {:e} and {products:?}",
                c.value
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_loses_what_lies_below_it() {
        let term = |value| Term::new(value, -126);
        let tiny = 2f64.powi(-25);
        let products = [1.0, tiny, tiny, -1.0].map(term);
        let model =
            Model { group: 4, extra: 1, rounding: Rounding::Zero, aligned: true, once: false };
        let sum = |model: Model| f32::from_bits(model.sum(&products, term(0.0), Sum::F32));
        assert_eq!(sum(model), 0.0);
        assert_eq!(sum(Model { extra: 2, ..model }), 2f32.powi(-24));
        // A large c cuts them too, where it is one of the terms.
        let few = [tiny; 4].map(term);
        let sum = |model: Model| f32::from_bits(model.sum(&few, term(1.0), Sum::F32));
        assert_eq!(sum(model), 1.0);
        assert_eq!(sum(Model { aligned: false, ..model }), 1.0 + f32::EPSILON);
        assert_eq!(sum(Model { extra: 2, ..model }), 1.0 + f32::EPSILON);
    }
}
