//! Kernels compiled by Triton, an independent compiler, against float64.

mod manifest;

use crate::support::compare::assert_close;
use crate::support::reference::{self, Attention};
use manifest::{Case, Ran, cases};

/// Runs every case of the manifest with this reference and compares one output.
fn check(
    name: &str,
    output: &str,
    want: impl Fn(&Case, &Ran) -> Vec<f64>,
    bound: impl Fn(&Case, &Ran) -> f64,
) {
    let cases: Vec<_> = cases().into_iter().filter(|case| case.reference["name"] == name).collect();
    assert!(!cases.is_empty(), "the manifest has no case of {name}");
    for case in cases {
        let ran = case.run();
        assert_close(&case.label, &ran.output(output), &want(&case, &ran), bound(&case, &ran));
    }
}

/// The output's own rounding, or that of tf32 operands where they are rounded.
fn product_bound(case: &Case, ran: &Ran) -> f64 {
    let operands = if case.reference["tf32"] == true { 2f64.powi(-10) } else { 1e-6 };
    ran.roundoff("c").max(operands)
}

fn product(case: &Case, ran: &Ran, transposed: bool) -> Vec<f64> {
    let sizes = [case.size("m"), case.size("n"), case.size("k")];
    reference::matmul(ran.input("a"), ran.input("b"), sizes, transposed)
}

#[test]
fn matrix_products() {
    check("matmul", "c", |case, ran| product(case, ran, false), product_bound);
}

#[test]
fn matrix_products_with_transposed_operand() {
    check("matmul_nt", "c", |case, ran| product(case, ran, true), product_bound);
}

#[test]
fn softmax() {
    let want = |case: &Case, ran: &Ran| reference::softmax(ran.input("x"), case.size("columns"));
    check("softmax", "y", want, |_, ran| ran.roundoff("y").max(1e-6));
}

#[test]
fn attention() {
    let want = |case: &Case, ran: &Ran| {
        let shape = Attention {
            heads: case.size("heads"),
            tokens: case.size("tokens"),
            d: case.size("d"),
            scale: case.reference["scale"].as_f64().expect("a scale"),
            causal: case.reference["causal"] == true,
        };
        reference::attention(ran.input("q"), ran.input("k"), ran.input("v"), shape)
    };
    // The weights are rounded to the element type before they meet the values.
    check("attention", "o", want, |_, ran| 2.0 * ran.roundoff("o"));
}

#[test]
fn sum_with_atomics() {
    check("sum", "total", |_, ran| vec![ran.input("x").iter().sum()], |_, _| 0.0);
}

#[test]
fn histogram_with_atomics() {
    let want = |case: &Case, ran: &Ran| {
        let mut bins = vec![0.0; case.size("bins")];
        for x in ran.input("x") {
            bins[*x as usize % case.size("bins")] += 1.0;
        }
        bins
    };
    check("histogram", "bins", want, |_, _| 0.0);
}
