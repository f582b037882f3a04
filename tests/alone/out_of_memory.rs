//! Memory that is not there is an error, and leaves state and outputs as they were. Every situation
//! is met by a process of its own, whose address space is limited.

use std::hint::black_box;
use std::process::Command;

use infini_attn::{
    DType, Error, Inputs, KeySums, Outputs, Problem, Result, Rope, SegmentMap, State, TensorView,
    TensorViewMut, Update, apply, compose, decode, flush, key_sums, merge_memories, merge_partials,
    prefill, reference, segment_map,
};

use crate::{alone, gradients};

/// Says in a child which situation to meet.
const SITUATION: &str = "INFINI_ATTN_TEST_SITUATION";

/// Address space of a child.
const LIMIT_KIB: usize = 1 << 20;

const DK: usize = 1 << 10;
const DV: usize = 1 << 11;
const N: usize = 1 << 10;

/// M is 8 MiB, the open segment 12 MiB, the scratch of a task some of each.
fn problem(update: Update) -> Problem {
    let builder = Problem::builder().key_dim(DK).value_dim(DV).segment_len(N).update(update);
    builder.build().expect("valid")
}

/// Tokens that are all alike: views of one row.
struct Rows(Vec<f32>);

impl Rows {
    fn view(&self, tokens: usize, dim: usize) -> TensorView<'_, f32> {
        TensorView::strided(&self.0, 0, &[1, tokens, 1, dim], &[0, 0, 0, 1]).expect("in the row")
    }

    fn inputs(&self, tokens: usize) -> Inputs<'_, f32> {
        let [q, v] = [DK, DV].map(|dim| self.view(tokens, dim));
        Inputs::new(q, q, v)
    }
}

/// A state, and what a call on it reads and writes.
struct Call {
    state: State,
    rows: Rows,
    out: Vec<f32>,
}

impl Call {
    /// With `seen` tokens in the state, and outputs of `tokens`.
    fn new(update: Update, seen: usize, tokens: usize) -> Self {
        Self::of(&problem(update), seen, tokens)
    }

    fn of(problem: &Problem, seen: usize, tokens: usize) -> Self {
        let state = State::new(problem, 1).expect("room");
        let mut call = Self { state, rows: Rows(vec![0.1; DV]), out: vec![0.0; seen.max(1) * DV] };
        call.run(prefill, seen, false).expect("room");
        call.out = vec![7.0; tokens * DV];
        call
    }

    fn run(&mut self, entry: Entry, tokens: usize, rotation: bool) -> Result<()> {
        let p = *self.state.problem();
        let o = TensorViewMut::new(&mut self.out[..tokens * DV], &[1, tokens, 1, DV])?;
        let table = TensorView::strided(&self.rows.0, 0, &[1 << 20, 8], &[0, 1])?;
        let mut inputs = self.rows.inputs(tokens);
        if rotation {
            inputs = inputs.rope(Rope::new(table, table));
        }
        entry(&p, &inputs, &[0.0], &mut self.state, Outputs::new(o))
    }
}

type Entry = fn(&Problem, &Inputs<'_, f32>, &[f32], &mut State, Outputs<'_, f32>) -> Result<()>;

const PIECE: usize = 64 << 10;

/// Takes all memory but so many pieces, which leave nothing in the allocator's lists.
fn ballast(left: usize) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = Vec::with_capacity((LIMIT_KIB << 10) / PIECE);
    loop {
        let mut piece = Vec::new();
        if piece.try_reserve_exact(PIECE).is_err() {
            break;
        }
        all.push(piece);
    }
    all.truncate(all.len() - left);
    all
}

/// What is left of memory where next to nothing is.
const LITTLE: usize = 4;

/// The operation without memory to spare; what it changed, as the state's bytes and the outputs, is
/// nothing. With memory it succeeds.
fn starved<R>(call: &mut Call, operation: impl Fn(&mut Call) -> Result<R>) -> Result<()> {
    let before = (call.state.to_bytes()?, call.state.bytes(), call.out.clone());
    let taken = black_box(ballast(LITTLE));
    let result = operation(call).map(drop);
    drop(taken);
    let after = (call.state.to_bytes()?, call.state.bytes(), call.out.clone());
    assert!(before == after || result.is_ok(), "something was changed");
    operation(call).map(drop).expect("there is memory now");
    result
}

/// As [`starved`], for an operation on maps, sums or the reference.
fn starved_alone<R>(operation: impl Fn() -> Result<R>) -> Result<()> {
    starved(&mut Call::new(Update::Linear, 0, 1), |_| operation())
}

/// What products take in every call, and who does not ask whether it is there.
const PRODUCTS: usize = 4 << 20;

/// The operation with ever more memory, by 2 MiB, up to what it takes: what it says first. So whatever it asks
/// for is missing once.
fn starved_ever_less(operation: &dyn Fn() -> Result<()>, bytes: usize) -> Result<()> {
    let mut first = Ok(());
    for left in (LITTLE..(bytes - PRODUCTS) / PIECE).step_by((2 << 20) / PIECE) {
        let taken = black_box(ballast(left));
        let result = operation();
        drop(taken);
        let error = result.expect_err("there is not so much memory");
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error:?}");
        first = first.and(Err(error));
    }
    first
}

fn map(p: &Problem, tokens: usize) -> Result<SegmentMap> {
    let rows = Rows(vec![0.1; DV]);
    segment_map(p, rows.view(tokens, DK), rows.view(tokens, DV), &KeySums::zero(p, 1)?)
}

/// A state or what else has `sequences` sequences must not fit.
fn fresh(sequences: usize) -> Result<()> {
    let p = Problem::builder().heads(8).head_dim(64).build()?;
    State::new(&p, sequences).map(drop)
}

type Situation = (&'static str, fn() -> Result<()>);

const SITUATIONS: &[Situation] = &[
    // [T, B, H, D] taken for [B, T, H, D]
    ("a state of 32768 slots: 279241031680 B", || fresh(32768)),
    ("a state of 4194304 slots: ", || fresh(1 << 22)),
    ("a state of 2305843009213693952 slots: ", || fresh(1 << 61)),
    ("a state of 18446744073709551615 slots: ", || fresh(usize::MAX)),
    ("a state of 1 slots: ", || {
        State::new(&Problem::builder().segment_len(1 << 24).build()?, 1).map(drop)
    }),
    ("a state of 3 slots: ", || {
        starved(&mut Call::new(Update::Delta, 1, 1), |call| call.state.fork(&[0, 0, 0]))
    }),
    ("a state of 2 slots: ", || {
        starved(&mut Call::new(Update::Delta, 1, 1), |call| {
            State::concat(&[&call.state, &call.state])
        })
    }),
    // A copy takes no memory; to write to it does.
    ("a copy of M: ", || {
        let mut call = Call::new(Update::Delta, 1, 1);
        let other = call.state.clone();
        starved(&mut call, |call| call.state.try_clone()?.reset(&[0]))?;
        black_box(other);
        Ok(())
    }),
    ("the memory of a state: ", || {
        let (m, z) = (vec![1.0; DK * DV], vec![1.0; DK]);
        starved_alone(|| State::from_parts(&problem(Update::Delta), &m, &z, &[9], &[9]))
    }),
    // Rotated keys are made room for by the first call that rotates.
    ("the rotated keys of the open segments: ", || {
        starved(&mut Call::new(Update::Delta, 0, 1), |call| call.run(decode, 1, true))
    }),
    // There is room for them, but not for the rest of that call: they are gone again.
    ("scratch of a task: ", || {
        let p = problem(Update::Delta).to_builder().segment_len(1).build()?;
        starved(&mut Call::of(&p, 0, 1), |call| call.run(decode, 1, true))
    }),
    ("scratch of a task: ", || {
        starved(&mut Call::new(Update::Delta, 5, 1), |call| call.run(decode, 1, false))
    }),
    ("scratch of a task: ", || {
        starved(&mut Call::new(Update::Delta, N - 1, 1), |call| call.run(decode, 1, false))
    }),
    ("the workspace of a prefill: ", || {
        starved(&mut Call::new(Update::Delta, N, 2 * N), |call| call.run(prefill, 2 * N, false))
    }),
    ("scratch of a task: ", || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
        let chains = |call: &mut Call| pool.install(|| call.run(prefill, 2 * N, false));
        starved(&mut Call::new(Update::Linear, N, 2 * N), chains)
    }),
    // G alone is 4 GiB, and only the delta rule's second segment has one.
    ("the workspace of a prefill: ", || {
        let p =
            |update| Problem::builder().key_dim(1 << 15).value_dim(1).segment_len(2).update(update);
        let run = |update| {
            let (p, rows, mut o) = (p(update).build()?, vec![0.1; 1 << 15], [0.0; 4]);
            let k = TensorView::strided(&rows, 0, &[1, 4, 1, 1 << 15], &[0, 0, 0, 1])?;
            let v = TensorView::strided(&rows, 0, &[1, 4, 1, 1], &[0, 1, 0, 1])?;
            let outputs = Outputs::new(TensorViewMut::new(&mut o, &[1, 4, 1, 1])?);
            prefill(&p, &Inputs::new(k, k, v), &[0.0], &mut State::new(&p, 1)?, outputs)
        };
        run(Update::Linear).expect("it has no G");
        run(Update::Delta)
    }),
    // Gradients, by chains and by phases.
    ("scratch of a task: ", || {
        let p = problem(Update::Delta).to_builder().heads(2).kv_heads(2).build()?;
        gradients::starved(&p, N + 1, starved_ever_less)
    }),
    ("the workspace of gradients: ", || {
        gradients::starved(&problem(Update::Delta), N + 1, starved_ever_less)
    }),
    ("scratch of a task: ", || {
        starved(&mut Call::new(Update::Delta, N + 3, 1), |call| {
            let p = *call.state.problem();
            call.run(decode, 1, false)?;
            flush(&p, &mut call.state, &[0])
        })
    }),
    ("scratch of a task: ", || {
        let mut call = Call::new(Update::Delta, N + 3, 1);
        starved(&mut call, |call| flush(&problem(Update::Delta), &mut call.state, &[0]))
    }),
    ("a copy of M: ", || {
        starved(&mut Call::new(Update::Linear, N, 1), |call| {
            merge_memories(&[&call.state, &call.state])
        })
    }),
    ("scratch of a task: ", || {
        let (row, out) = (vec![1.0f32; 1 << 22], std::cell::RefCell::new(vec![0.0f32; 1 << 22]));
        let part = TensorView::new(&row, &[1, 1, 1, 1 << 22])?;
        let lse = TensorView::new(&row[..1], &[1, 1, 1])?;
        starved_alone(|| {
            let mut out = out.borrow_mut();
            let view = TensorViewMut::new(&mut out[..], &[1, 1, 1, 1 << 22])?;
            merge_partials(&[part, part], &[lse, lse], view, None)
        })
    }),
    ("key sums: ", || KeySums::zero(&problem(Update::Delta), 1 << 61).map(drop)),
    ("key sums: ", || {
        // 2^40 sequences without tokens
        let k = TensorView::<f32>::new(&[], &[1 << 40, 0, 1, DK])?;
        key_sums(&problem(Update::Delta), k).map(drop)
    }),
    ("key sums: ", || {
        let p =
            Problem::builder().heads(1 << 10).key_dim(DK).value_dim(1).segment_len(1).build()?;
        let sums = KeySums::zero(&p, 1)?;
        starved_alone(|| sums.add(&sums))
    }),
    ("scratch of a task: ", || {
        let rows = Rows(vec![0.1; DV]);
        starved_alone(|| key_sums(&problem(Update::Delta), rows.view(N, DK)))
    }),
    ("a segment map: ", || starved_alone(|| map(&problem(Update::Delta), 2 * N))),
    ("a segment map: ", || {
        let p = Problem::builder().key_dim(1 << 15).value_dim(1).segment_len(1).build()?;
        let k = TensorView::<f32>::new(&[], &[1, 0, 1, 1 << 15])?;
        segment_map(&p, k, TensorView::new(&[], &[1, 0, 1, 1])?, &KeySums::zero(&p, 1)?).map(drop)
    }),
    ("a segment map: ", || {
        let none = map(&problem(Update::Delta), 0)?;
        starved_alone(|| compose(&none, &none))
    }),
    ("scratch of a task: ", || {
        let none = map(&problem(Update::Delta), 0)?;
        let mut call = Call::new(Update::Delta, 0, 1);
        starved(&mut call, |call| apply(&none, &mut call.state))
    }),
    ("a reference state of 2305843009213693952 slots: ", || {
        reference::State::new(&problem(Update::Delta), 1 << 61).map(drop)
    }),
    ("the reference's outputs: ", || {
        let p = Problem::builder().head_dim(1).build()?;
        let x = TensorView::strided(&[1.0f32], 0, &[1, 1 << 40, 1, 1], &[0; 4])?;
        let mut state = reference::State::new(&p, 1)?;
        reference::prefill(&p, &Inputs::new(x, x, x), &[0.0], &mut state).map(drop)
    }),
    ("a reference state: ", || {
        let rows = Rows(vec![0.1; DV]);
        let state = std::cell::RefCell::new(reference::State::new(&problem(Update::Delta), 1)?);
        let result = starved_alone(|| {
            let (p, mut state) = (problem(Update::Delta), state.borrow_mut());
            let tokens = state.tokens(0);
            let result = reference::prefill(&p, &rows.inputs(1), &[0.0], &mut state);
            assert!(result.is_ok() || state.tokens(0) == tokens, "the state was changed");
            result
        });
        let state = state.into_inner();
        assert_eq!((state.tokens(0), state.open_len(0)), (1, 1));
        result
    }),
];

#[test]
fn is_an_error_everywhere() {
    let _alone = alone();
    let program = std::env::current_exe().expect("this program");
    let meet = |i: usize| {
        let child = Command::new("sh")
            .args(["-c", &format!("ulimit -v {LIMIT_KIB} && exec \"$0\" \"$@\"")])
            .arg(&program)
            .args(["--exact", "out_of_memory::meets_a_situation", "--nocapture"])
            .env(SITUATION, i.to_string())
            .env("RAYON_NUM_THREADS", "2")
            // Others would keep address space of their own.
            .env("MALLOC_ARENA_MAX", "1")
            .output()
            .expect("sh");
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&child.stdout),
            String::from_utf8_lossy(&child.stderr)
        );
        (!child.status.success())
            .then(|| format!("{i}, {}: {}\n{text}", SITUATIONS[i].0, child.status))
    };
    let failed: Vec<String> = (0..SITUATIONS.len()).filter_map(meet).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Alone it does nothing: it is what the children run.
#[test]
fn meets_a_situation() {
    let Ok(i) = std::env::var(SITUATION) else { return };
    let (start, situation) = SITUATIONS[i.parse::<usize>().expect("an index")];
    // The pool, and what the products keep for later.
    warm_up();
    let error = situation().expect_err("there is not so much memory");
    let text = error.to_string();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error:?}");
    assert!(text.starts_with(start) && text.ends_with("the system has not so much"), "{text}");
}

fn warm_up() {
    let p = Problem::builder().heads(4).segment_len(16).dtype(DType::F32).build().expect("valid");
    let (x, mut o) = (vec![0.1; 64 * 4 * 64], vec![0.0; 64 * 4 * 64]);
    let shape = [1, 64, 4, 64];
    let view = TensorView::new(&x, &shape).expect("shape");
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &shape).expect("shape"));
    let mut state = State::new(&p, 1).expect("room");
    prefill(&p, &Inputs::new(view, view, view), &[0.0; 4], &mut state, outputs).expect("valid");
}
