//! Plans of decode.

use crate::common::plans::{after, base, call, launches, mirror, params, problem, run};
use infini_attn::Problem;
use infini_attn::cuda::params::*;
use infini_attn::cuda::{Call, DecodeOptions, Mirror, Operand, Plan, Runs, Target, plan_decode};

fn decode(p: &Problem, call: &Call<'_>, state: &Mirror, runs: Runs) -> Plan {
    plan_decode(
        p,
        call,
        state,
        &DecodeOptions { runs, target: Target { split_len: 64, ..Target::DEFAULT } },
    )
    .expect("valid")
}

#[test]
fn decode_steps_and_commits() {
    let p = problem(|b| b.heads(48).segment_len(200));
    let state = after(&p, &[0, 190, 199]);
    let names = |plan: &Plan| launches(plan).iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let plan = decode(&p, &call(&p, &[3, 1]), &state, Runs::Once);
    assert_eq!(names(&plan), ["decode", "commit"], "slot 2 fills");
    let lens = [1, 1, 0];
    let plan = decode(&p, &call(&p, &[3, 1]).seq_lens(&lens), &state, Runs::Once);
    assert_eq!(names(&plan), ["decode", "clear_padding"], "no segment fills");
    let plan = decode(&p, &call(&p, &[3, 16]), &state, Runs::Once);
    assert_eq!(names(&plan), ["decode", "commit", "decode"]);
    // 24 heads of a group by 16 tokens are 12 tiles of 32 rows; 200 keys are 4 splits of 64, and
    // there is one block more for the retrieval.
    let first: InfiniDecode = params(&plan, "decode", 0);
    assert_eq!((first.row_tiles, first.splits, first.split_len, first.step), (12, 4, 64, 0));
    let second: InfiniDecode = params(&plan, "decode", 1);
    assert_eq!(second.step, 1);
    assert_eq!(launches(&plan)[0].1, [60, 2, 3]);
    let commit: InfiniCommit = params(&plan, "commit", 0);
    // At least 170 tokens per chunk.
    assert_eq!((commit.chunks, commit.chunk_len, commit.flush), (2, 192, 0));
    assert_eq!(launches(&plan)[1], ("commit", [2, 2, 3]));
    let exchange = plan.state().expect("of states").params(base(Operand::State));
    assert!(first.exchange.head_tickets > exchange.status);
    assert_ne!(first.exchange.partials, commit.exchange.partials);

    // As many splits as one run needs; any number of runs may reach the segment's end.
    let state = after(&p, &[0, 63, 64]);
    for (runs, splits) in [(Runs::Once, 2), (Runs::Replay, 4), (Runs::Table, 4)] {
        let plan = decode(&p, &call(&p, &[3, 1]), &state, runs);
        assert_eq!(params::<InfiniDecode>(&plan, "decode", 0).splits, splits, "{runs:?}");
    }
    // Few multiprocessors are filled by the blocks of few sequences at a time.
    for (multiprocessors, at_a_time) in [(1, 1), (5, 2), (132, 3)] {
        let target = Target { multiprocessors, ..Target::DEFAULT };
        let options = DecodeOptions { runs: Runs::Replay, target };
        let plan = plan_decode(&p, &call(&p, &[3, 1]), &state, &options).expect("valid");
        assert_eq!(launches(&plan)[1], ("commit", [2, 2, at_a_time]));
    }

    let short = problem(|b| b.segment_len(4));
    for (tokens, steps) in [(1, 1), (2, 2), (5, 2), (6, 3), (16, 5)] {
        for runs in [Runs::Replay, Runs::Table] {
            let plan = decode(&short, &call(&short, &[1, tokens]), &mirror(&short, 1), runs);
            let mut expected = ["decode", "commit"].repeat(steps);
            // Any sequence of a table may be short, or padding.
            expected.extend((runs == Runs::Table).then_some("clear_padding"));
            assert_eq!(names(&plan), expected, "{tokens} tokens");
        }
        let plan = decode(&short, &call(&short, &[1, tokens]), &mirror(&short, 1), Runs::Once);
        let expected = 2 * (tokens / 4) + usize::from(tokens % 4 > 0);
        assert_eq!(names(&plan).len(), expected, "{tokens} tokens from an empty segment");
    }
    for runs in [Runs::Once, Runs::Replay, Runs::Table] {
        assert!(run(&decode(&short, &call(&short, &[1, 0]), &mirror(&short, 1), runs)).is_empty());
    }
}

#[test]
fn decode_with_a_table_of_the_caller() {
    let p = problem(|b| b);
    let state = mirror(&p, 4);
    let (slots, lens) = ([3, 1], [0, 2]);
    let call = call(&p, &[2, 3]).slots(&slots).seq_lens(&lens);
    let plan = decode(&p, &call, &state, Runs::Table);
    let s = params::<InfiniDecode>(&plan, "decode", 0).sequences;
    assert_eq!((s.table, s.count, s.max_len), (base(Operand::Sequences), 2, 3));
    let need = plan.requirements().iter().find(|r| r.operand == Operand::Sequences);
    let need = need.expect("the table is needed");
    assert_eq!((need.align, need.before, need.after), (8, 0, 2 * 24));
    assert_eq!(params::<InfiniCommit>(&plan, "commit", 0).sequences.table, s.table);
    assert_eq!(params::<InfiniClearPadding>(&plan, "clear_padding", 0).sequences.table, s.table);
}
