//! States of the reference as rows of numbers.

use crate::common::stream::{normals, rope_tables};
use infini_attn::reference::{self, State, StateGradient, row_len};
use infini_attn::{Error, Inputs, Problem, Rope, TensorView};

const SLOTS: usize = 2;

fn problem() -> Problem {
    let sizes = Problem::builder().heads(2).kv_heads(1).key_dim(4).value_dim(3);
    sizes.segment_len(4).build().unwrap()
}

/// Seven tokens more in every slot; the output.
fn advance(state: &mut State, seed: u64) -> Vec<f64> {
    let numbers = |i, heads, width| normals(seed + i, SLOTS * 7 * heads * width);
    let (q, k, v) = (numbers(0, 2, 4), numbers(1, 1, 4), numbers(2, 1, 3));
    fn view(x: &[f32], heads: usize, width: usize) -> TensorView<'_, f32> {
        TensorView::new(x, &[SLOTS, 7, heads, width]).unwrap()
    }
    let (cos, sin) = rope_tables(32, 2, 1.0);
    let rope = Rope::new(
        TensorView::new(&cos, &[32, 1]).unwrap(),
        TensorView::new(&sin, &[32, 1]).unwrap(),
    );
    let inputs = Inputs::new(view(&q, 2, 4), view(&k, 1, 4), view(&v, 1, 3)).rope(rope);
    reference::prefill(&problem(), &inputs, &[0.5, -0.5], state).unwrap().o
}

#[test]
fn a_state_goes_on_from_its_rows() {
    let (p, mut state) = (problem(), State::new(&problem(), SLOTS).unwrap());
    advance(&mut state, 1);
    let rows = state.to_rows().unwrap();
    assert_eq!(rows.len(), SLOTS * row_len(&p));
    assert_eq!(rows[rows.len() - 4..], [7.0, 4.0, 3.0, 1.0]);
    let mut again = State::from_rows(&p, SLOTS, &rows).unwrap();
    assert_eq!(again.to_rows().unwrap(), rows);
    assert_eq!(advance(&mut again, 5), advance(&mut state, 5));
    assert_eq!(again.to_rows().unwrap(), state.to_rows().unwrap());
}

#[test]
fn gradients_are_rows_without_counters() {
    let p = problem();
    let rows: Vec<f64> = (1..=SLOTS * row_len(&p)).map(|i| i as f64).collect();
    let mut expected = rows.clone();
    // One token of three in the first slot, all of those that there may be in the second.
    let token = 2 * 4 + 3;
    for (row, open_len) in expected.chunks_exact_mut(row_len(&p)).zip([1, 3]) {
        row[4 * 3 + 4 + open_len * token..].fill(0.0);
    }
    let gradient = StateGradient::from_rows(&p, &[1, 3], &rows).unwrap();
    assert_eq!(gradient.to_rows(&p).unwrap(), expected);
}

#[test]
fn what_is_no_state_is_refused() {
    let p = problem();
    let rows = State::new(&p, 1).unwrap().to_rows().unwrap();
    let refused = |at: usize, value: f64| {
        let mut rows = rows.clone();
        let at = rows.len() - 4 + at;
        rows[at] = value;
        matches!(State::from_rows(&p, 1, &rows), Err(Error::Value { .. }))
    };
    for (at, value) in [(0, 0.5), (0, -1.0), (0, f64::NAN), (1, 1.0), (2, 4.0), (2, 1.0), (3, 2.0)]
    {
        assert!(refused(at, value), "{value} in place of counter {at}");
    }
    assert!(!refused(0, 9.0));
    for slots in [0, 2, usize::MAX] {
        assert!(matches!(State::from_rows(&p, slots, &rows), Err(Error::Length { .. })));
    }
    assert!(matches!(StateGradient::from_rows(&p, &[0; 2], &rows), Err(Error::Length { .. })));
}
