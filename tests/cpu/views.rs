//! Views over buffers that fit exactly: whatever the strides, results are those of contiguous tensors
//! and nothing outside is touched (build with AddressSanitizer to see reads: CONTRIBUTING.md).

use infini_attn::{
    Error, Inputs, Outputs, Problem, Rope, State, TensorView, TensorViewMut, decode, flush,
    key_sums, merge_partials, prefill, reference,
};

/// Strides that no memory has.
const ABSURD: [i64; 4] = [i64::MAX, i64::MIN, 1 << 61, -(1 << 50)];

#[test]
fn a_view_without_elements_may_have_any_strides() {
    for shape in [[0, 3, 2, 4], [2, 0, 2, 4], [2, 3, 0, 4], [2, 3, 2, 0]] {
        let at_the_end = &[1.0f32; 8][8..];
        for (data, offset) in [(&[][..], 0), (at_the_end, usize::MAX / 3)] {
            let view = TensorView::<f32>::strided(data, offset, &shape, &ABSURD).expect("empty");
            assert_eq!(view.as_slice(), Some(&[][..]));
        }
        // SAFETY: there are no elements.
        unsafe {
            TensorView::<f32>::from_raw(std::ptr::null(), &shape, &ABSURD).expect("empty");
            TensorViewMut::<f32>::from_raw(std::ptr::null_mut(), &shape, &ABSURD).expect("empty");
        }
    }
}

#[test]
fn null_has_no_elements() {
    // SAFETY: refused.
    let views = unsafe {
        [
            TensorView::<f32>::from_raw(std::ptr::null(), &[2, 1], &[0, 0]).map(drop),
            TensorViewMut::<f32>::from_raw(std::ptr::null_mut(), &[2, 1], &[1, 0]).map(drop),
        ]
    };
    for view in views {
        let error = view.expect_err("null");
        assert!(matches!(error, Error::Address { got: 0, .. }), "{error}");
        assert_eq!(error.to_string(), "data: address 0x0 given, that of [2, 1] elements expected");
    }
}

/// Inputs and outputs of B sequences without tokens, at strides that lead out of everything.
#[test]
fn calls_without_tokens_form_no_rows() {
    let p = Problem::builder().heads(2).kv_heads(1).key_dim(4).value_dim(3).segment_len(2);
    let p = p.build().expect("valid");
    let empty = |heads, dim| {
        TensorView::<f32>::strided(&[], 0, &[2, 0, heads, dim], &ABSURD).expect("empty")
    };
    let (q, k, v) = (empty(2, 4), empty(1, 4), empty(1, 3));
    let mut state = State::new(&p, 2).expect("room");
    for entry in [prefill::<f32>, decode::<f32>] {
        let mut nothing: [Vec<f32>; 4] = Default::default();
        let [o, a_dot, a_mem, lse] = &mut nothing;
        let like_o = |data| TensorViewMut::strided(data, 7, &[2, 0, 2, 3], &ABSURD).expect("empty");
        let lse = TensorViewMut::strided(lse, 9, &[2, 2, 0], &ABSURD[..3]).expect("empty");
        let outputs = Outputs::new(like_o(o)).a_dot(like_o(a_dot)).a_mem(like_o(a_mem)).lse(lse);
        let inputs = Inputs::new(q, k, v).seq_lens(&[0, 0]);
        entry(&p, &inputs, &[0.0; 2], &mut state, outputs).expect("valid");
    }
    flush(&p, &mut state, &[0, 1]).expect("valid");
    assert_eq!(key_sums(&p, k).expect("valid").sums().as_slice(), Some(&[0.0; 8][..]));
    let mut oracle = reference::State::new(&p, 2).expect("room");
    reference::prefill(&p, &Inputs::new(q, k, v), &[0.0; 2], &mut oracle).expect("valid");
}

/// Values of width 0 still have log-sum-exps; extents whose product no integer holds have nothing.
#[test]
fn merges_without_channels_form_no_rows() {
    let part = TensorView::<f32>::strided(&[], 3, &[1, 2, 2, 0], &ABSURD).expect("empty");
    let logs = [0.5f32, 1.5, 2.5, f32::NEG_INFINITY];
    let lse = TensorView::new(&logs, &[1, 2, 2]).expect("shape");
    let mut merged = [0.0; 4];
    let out = TensorViewMut::strided(&mut [], 5, &[1, 2, 2, 0], &ABSURD).expect("empty");
    let out_lse = TensorViewMut::new(&mut merged, &[1, 2, 2]).expect("shape");
    merge_partials(&[part], &[lse], out, Some(out_lse)).expect("valid");
    assert_eq!(merged, logs);

    for shape in [[1 << 40, 1, 1 << 40, 0], [1 << 40, 1 << 40, 0, 1]] {
        let part = TensorView::<f32>::strided(&[], 0, &shape, &ABSURD).expect("empty");
        let logs = [shape[0], shape[2], shape[1]];
        let lse = TensorView::strided(&[1.0f32], 0, &logs, &[0; 3]).expect("one element");
        let out = TensorViewMut::strided(&mut [], 0, &shape, &ABSURD).expect("empty");
        merge_partials(&[part], &[lse], out, None).expect("nothing to do");
    }
}

/// Sequences of 2^62 tokens that are all one row, or padding: no product of their extents may wrap.
#[test]
fn extents_near_the_end_of_the_integers_are_refused_by_name() {
    let p = Problem::builder().head_dim(1).segment_len(2).build().expect("valid");
    let one = [1.0f32];
    let x = TensorView::strided(&one, 0, &[4, 1 << 62, 1, 1], &[0; 4]).expect("one element");
    let mut state = State::new(&p, 4).expect("room");
    let mut o = [7.0f32; 4];
    let rows = TensorView::new(&one, &[1, 1]).expect("shape");
    let none = TensorView::new(&[], &[1, 0]).expect("shape");
    let padding = Inputs::new(x, x, x).seq_lens(&[0; 4]);
    let calls = [
        (Inputs::new(x, x, x), "o: shape"),
        (padding, "o: shape"),
        (padding.rope(Rope::new(rows, rows)), "rope.cos: shape"),
        (padding.rope(Rope::new(none, none).positions(&[0])), "positions: 1"),
    ];
    for (inputs, start) in calls {
        for entry in [prefill::<f32>, decode::<f32>] {
            let outputs = Outputs::new(TensorViewMut::new(&mut o, &[4, 1, 1, 1]).expect("shape"));
            let error = entry(&p, &inputs, &[0.0], &mut state, outputs).expect_err("too large");
            assert!(error.to_string().starts_with(start), "{error}");
        }
    }
    assert_eq!(o, [7.0; 4]);
}
