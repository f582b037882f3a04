//! Problems as data, under the feature `serde`: what is written is read again, bit by bit, and what the
//! builder refuses is refused.

use infini_attn::{DType, Denominator, EmptyMemory, Problem, Update};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::cases::cases;

fn read(data: Value) -> Result<Problem, String> {
    serde_json::from_str(&data.to_string()).map_err(|error| error.to_string())
}

fn refused(data: Value, expected: &str) {
    let error = read(data.clone()).expect_err("refused");
    assert!(error.contains(expected), "{data}: {error}");
}

#[test]
fn the_problems_of_the_table_come_back() {
    for case in cases() {
        let text = serde_json::to_string(&case.problem).expect("text");
        let back: Problem = serde_json::from_str(&text).expect(&text);
        assert_eq!(back, case.problem, "{}", case.name);
    }
}

#[test]
fn fields_have_these_names_and_forms() {
    let problem = Problem::builder().heads(4).kv_heads(2).head_dim(16).segment_len(8);
    let problem = problem.update(Update::Linear).empty_memory(EmptyMemory::Bypass);
    let problem =
        problem.denominator(Denominator::Add(0.25)).dtype(DType::F16).build().expect("fits");
    let expected = json!({
        "heads": 4, "kv_heads": 2, "key_dim": 16, "value_dim": 16, "segment_len": 8,
        "update": "linear", "empty_memory": "bypass", "denominator": "add:2.5e-1", "scale": 0.25,
        "dtype": "f16",
    });
    assert_eq!(serde_json::to_value(problem).expect("data"), expected);
    assert_eq!(serde_json::from_value::<Problem>(expected).expect("a problem"), problem);
}

#[test]
fn what_is_absent_is_as_the_builder_starts() {
    assert_eq!(read(json!({})), Ok(Problem::builder().build().expect("valid")));
    let built = Problem::builder().heads(6).head_dim(16).build().expect("valid");
    assert_eq!(read(json!({ "heads": 6, "key_dim": 16, "value_dim": 16 })), Ok(built));
}

#[test]
fn what_the_builder_refuses_is_refused() {
    refused(json!({ "heads": 0 }), "heads: 0 given, 1 to 16777216 expected");
    refused(json!({ "heads": 8, "kv_heads": 3 }), "kv_heads: 3 given, a divisor of heads = 8");
    refused(json!({ "scale": 1e39 }), "scale: 1000000000000000000000000000000000000000 given");
    refused(json!({ "denominator": "clamp:0" }), "denominator: clamp:0e0 given, a positive");
    refused(json!({ "denominator": "max" }), "denominator: max given, exact, clamp:EPS");
    refused(json!({ "update": "Delta" }), "update: Delta given, linear or delta expected");
    refused(json!({ "empty_memory": "zero" }), "empty_memory: zero given, gate or bypass expected");
    refused(json!({ "dtype": "f64" }), "dtype: f64 given, f32, f16 or bf16 expected");
    refused(json!({ "head_dim": 64 }), "unknown field `head_dim`");
    refused(json!({ "heads": -1 }), "invalid value: integer `-1`");
}

proptest! {
    #[test]
    fn any_scale_and_epsilon_come_back(
        scale in proptest::num::f64::NORMAL,
        eps in proptest::num::f32::POSITIVE | proptest::num::f32::SUBNORMAL,
    ) {
        let policies = [Denominator::Clamp(eps.abs()), Denominator::Add(eps.abs())];
        for denominator in policies {
            let builder = Problem::builder().scale(scale.clamp(-3e38, 3e38)).denominator(denominator);
            let problem = builder.build().expect("valid");
            let text = serde_json::to_string(&problem).expect("text");
            prop_assert_eq!(serde_json::from_str::<Problem>(&text).expect("a problem"), problem);
        }
    }
}
