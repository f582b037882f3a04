//! Plans of prompts and single tokens in one call.

use crate::common::plans::{after, call, launches, mirror, params, problem, table};
use infini_attn::cuda::params::*;
use infini_attn::cuda::{Call, Mirror, Plan, PrefillOptions, plan_forward};
use infini_attn::{Error, Problem};

fn forward(p: &Problem, call: &Call<'_>, state: &Mirror) -> Plan {
    plan_forward(p, call, state, &PrefillOptions::default()).expect("valid")
}

#[test]
fn short_sequences_are_decoded_and_long_ones_prefilled() {
    let p = problem(|b| b.heads(2).kv_heads(1));
    let state = after(&p, &[0, 127, 5, 40]);
    let (cu, slots) = ([0, 300, 301, 317, 317], [3, 1, 0, 2]);
    let packed = call(&p, &[317]).cu_seqlens(&cu).slots(&slots);
    let plan = forward(&p, &packed, &state);
    let names: Vec<_> = launches(&plan).iter().map(|(name, _)| *name).collect();
    let (decoding, prefilling) = names.split_at(2);
    assert_eq!(decoding, ["decode", "commit"], "slot 1 fills");
    assert_eq!((prefilling[0], prefilling[prefilling.len() - 1]), ("segment_state", "append"));
    let decode: InfiniDecode = params(&plan, "decode", 0);
    let all = &decode.sequences.inline_sequences[..4];
    assert_eq!((decode.sequences.count, decode.sequences.max_len), (4, 16));
    let got: Vec<_> = all.iter().map(|s| (s.first, s.slot, s.len)).collect();
    assert_eq!(got, [(0, 3, 0), (300, 1, 1), (301, 0, 16), (317, 2, 0)]);
    let append: InfiniAppend = params(&plan, "append", 0);
    let pieces: Vec<InfiniPiece> = table(&plan, append.run.pieces, append.run.piece_count as usize);
    assert!(pieces.iter().all(|piece| piece.slot == 3));
    assert_eq!(pieces.iter().map(|piece| piece.len).sum::<i32>(), 300);
    // All of it is one step of the streams.
    let mut moved = state.clone();
    moved.advance(&plan).expect("its own");
    assert_eq!([0, 1, 2, 3].map(|slot| moved.tokens(slot)), [16, 128, 5, 340]);
    assert_eq!([0, 1, 2, 3].map(|slot| moved.open_len(slot)), [16, 0, 5, 84]);
    assert!(moved.advance(&plan).is_err(), "planned for other counters");
}

#[test]
fn padding_is_cleared_once_and_for_all_sequences() {
    let p = problem(|b| b.heads(2).kv_heads(1));
    let lens = [1, 40, 0];
    let plan = forward(&p, &call(&p, &[3, 40]).seq_lens(&lens), &mirror(&p, 3));
    let names: Vec<_> = launches(&plan).iter().map(|(name, _)| *name).collect();
    assert_eq!(names.iter().filter(|name| **name == "clear_padding").count(), 1);
    let clear: InfiniClearPadding = params(&plan, "clear_padding", 0);
    let all = &clear.sequences.inline_sequences[..3];
    assert_eq!(all.iter().map(|s| (s.batch, s.len)).collect::<Vec<_>>(), [(0, 1), (1, 40), (2, 0)]);
}

#[test]
fn calls_of_one_kind_are_planned_as_that() {
    let p = problem(|b| b.heads(2).kv_heads(1));
    let title = |tokens, lens: &[i32]| {
        let call = call(&p, &[2, tokens]).seq_lens(lens);
        forward(&p, &call, &mirror(&p, 2)).to_string().lines().next().expect("a title").to_owned()
    };
    assert!(title(40, &[16, 1]).starts_with("decode "), "{}", title(40, &[16, 1]));
    assert!(title(40, &[17, 40]).starts_with("prefill "), "{}", title(40, &[17, 40]));
    assert!(title(40, &[17, 0]).starts_with("prefill "), "{}", title(40, &[17, 0]));
    assert!(title(40, &[17, 16]).starts_with("forward "), "{}", title(40, &[17, 16]));
    assert!(title(40, &[0, 0]).starts_with("decode "), "{}", title(40, &[0, 0]));
    let wrong = plan_forward(&p, &call(&p, &[2, 4]), &mirror(&p, 3), &PrefillOptions::default());
    assert!(matches!(wrong, Err(Error::Length { .. } | Error::Value { .. })), "{wrong:?}");
}
