//! Saving and loading: a loaded state continues bit for bit.

use half::bf16;

use crate::common::narrow;
use crate::common::stream::uniforms;
use infini_attn::{
    DType, Denominator, Element, EmptyMemory, Error, Inputs, Outputs, Problem, Rope, State,
    TensorView, TensorViewMut, Update, flush, prefill,
};
use proptest::prelude::*;

/// One packed call with lengths `lens` into `slots`; returns o, lse.
fn call<T: Element>(
    state: &mut State,
    seed: u64,
    slots: &[usize],
    lens: &[usize],
    rope: bool,
) -> (Vec<T>, Vec<f32>) {
    let p = *state.problem();
    let (hq, hkv, dk, dv) = (p.heads(), p.kv_heads(), p.key_dim(), p.value_dim());
    let mut cu = vec![0i32];
    lens.iter().for_each(|&len| cu.push(cu[cu.len() - 1] + len as i32));
    let total: usize = lens.iter().sum();
    let q: Vec<T> = narrow(&uniforms(3 * seed, total * hq * dk));
    let k: Vec<T> = narrow(&uniforms(3 * seed + 1, total * hkv * dk));
    let v: Vec<T> = narrow(&uniforms(3 * seed + 2, total * hkv * dv));
    let (cos, sin): (Vec<f32>, Vec<f32>) = (0..1024 * (dk / 2))
        .map(|i| ((i / (dk / 2)) as f32 * 0.3f32.powi((i % (dk / 2)) as i32)).sin_cos())
        .map(|(s, c)| (c, s))
        .unzip();
    let table = |values| TensorView::new(values, &[1024, dk / 2]).unwrap();
    let mut inputs = Inputs::new(
        TensorView::new(&q, &[total, hq, dk]).unwrap(),
        TensorView::new(&k, &[total, hkv, dk]).unwrap(),
        TensorView::new(&v, &[total, hkv, dv]).unwrap(),
    )
    .cu_seqlens(&cu)
    .slots(slots);
    if rope {
        inputs = inputs.rope(Rope::new(table(&cos), table(&sin)));
    }
    let (mut o, mut lse) = (vec![T::zeroed(); total * hq * dv], vec![0.0; hq * total]);
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &[total, hq, dv]).unwrap())
        .lse(TensorViewMut::new(&mut lse, &[hq, total]).unwrap());
    let gate = uniforms(99, hq);
    prefill(&p, &inputs, &gate, state, outputs).unwrap();
    (o, lse)
}

pub(crate) fn problem(update: Update, dtype: DType) -> Problem {
    Problem::builder()
        .heads(4)
        .kv_heads(2)
        .key_dim(6)
        .value_dim(5)
        .segment_len(8)
        .update(update)
        .dtype(dtype)
        .build()
        .unwrap()
}

/// Five slots: memory and a rotated open segment, memory and an unrotated one, memory only, an
/// open segment only, nothing.
pub(crate) fn varied<T: Element>(p: &Problem) -> State {
    let mut state = State::new(p, 5).unwrap();
    call::<T>(&mut state, 1, &[0, 3], &[21, 5], true);
    call::<T>(&mut state, 2, &[1, 2], &[12, 16], false);
    state
}

fn bits<T: Element>((o, lse): &(Vec<T>, Vec<f32>)) -> Vec<u8> {
    [bytemuck::cast_slice(o), bytemuck::cast_slice(lse)].concat()
}

pub(crate) fn assert_same(a: &State, b: &State) {
    assert_eq!(a.problem(), b.problem());
    assert_eq!(a.sequences(), b.sequences());
    for s in 0..a.sequences() {
        assert_eq!(
            (a.tokens(s), a.committed(s), a.open_len(s)),
            (b.tokens(s), b.committed(s), b.open_len(s)),
            "slot {s}"
        );
    }
    assert_eq!(a.to_bytes().unwrap(), b.to_bytes().unwrap());
}

fn continues<T: Element>(update: Update) {
    let p = problem(update, T::DTYPE);
    let mut through = varied::<T>(&p);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    through.save(&path).unwrap();
    let mut loaded = State::load_for(&p, &path).unwrap();
    assert_same(&through, &loaded);
    assert_eq!((loaded.open_len(0), loaded.open_len(1), loaded.open_len(3)), (5, 4, 5));
    assert_eq!(loaded.committed(0), 16);
    // Rotated and unrotated slots go on within their open segments, then past segment ends.
    for (seed, slots, lens, rope) in [
        (3, [0, 3, 4], [1, 2, 3], true),
        (4, [2, 1, 4], [7, 3, 0], false),
        (5, [3, 0, 4], [30, 2, 9], true),
        (6, [1, 2, 2], [20, 1, 0], false),
    ] {
        let n = if seed == 6 { 2 } else { 3 };
        let a = call::<T>(&mut through, seed, &slots[..n], &lens[..n], rope);
        let b = call::<T>(&mut loaded, seed, &slots[..n], &lens[..n], rope);
        assert_eq!(bits(&a), bits(&b), "call {seed}");
    }
    flush(&p, &mut through, &[0, 4]).unwrap();
    flush(&p, &mut loaded, &[0, 4]).unwrap();
    assert_same(&through, &loaded);
    assert_ne!(through.to_bytes().unwrap(), std::fs::read(&path).unwrap());
}

#[test]
fn a_loaded_state_continues_bit_for_bit() {
    for update in [Update::Linear, Update::Delta] {
        continues::<f32>(update);
        continues::<bf16>(update);
        continues::<half::f16>(update);
    }
}

#[test]
fn states_without_slots_or_without_tokens_are_kept() {
    let p = problem(Update::Delta, DType::F32);
    for sequences in [0, 1, 3] {
        let state = State::new(&p, sequences).unwrap();
        assert_same(&State::from_bytes(&state.to_bytes().unwrap()).unwrap(), &state);
    }
}

#[test]
fn every_policy_is_kept() {
    let p = problem(Update::Linear, DType::F32)
        .to_builder()
        .empty_memory(EmptyMemory::Bypass)
        .scale(std::f64::consts::PI)
        .denominator(Denominator::Clamp(1e-10));
    for denominator in [Denominator::Exact, Denominator::Clamp(1e-10), Denominator::Add(0.1)] {
        let p = p.denominator(denominator).build().unwrap();
        let bytes = State::new(&p, 1).unwrap().to_bytes().unwrap();
        assert_eq!(State::from_bytes(&bytes).unwrap().problem(), &p);
    }
}

#[test]
fn a_state_of_another_problem_is_refused_by_name() {
    let p = problem(Update::Delta, DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    varied::<f32>(&p).save(&path).unwrap();
    assert!(State::load_for(&p, &path).is_ok());
    let b = p.to_builder();
    for (name, other) in [
        ("heads", b.heads(6)),
        ("kv_heads", b.kv_heads(4)),
        ("key_dim", b.key_dim(8)),
        ("value_dim", b.value_dim(6)),
        ("segment_len", b.segment_len(16)),
        ("update", b.update(Update::Linear)),
        ("empty_memory", b.empty_memory(EmptyMemory::Bypass)),
        ("denominator", b.denominator(Denominator::Add(1e-6))),
        ("scale", b.scale(0.25)),
        ("dtype", b.dtype(DType::BF16)),
    ] {
        match State::load_for(&other.build().unwrap(), &path) {
            Err(Error::Problem { field, got, expected }) => {
                assert_eq!(field, name);
                assert_ne!(got, expected);
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_state_comes_back(
        (hkv, group, dk, dv, n) in (1usize..3, 1usize..3, 1usize..9, 1usize..9, 1usize..300),
        lens in prop::collection::vec(0usize..400, 0..4),
        more in 1usize..20,
        rope in any::<bool>(),
        delta in any::<bool>(),
    ) {
        let p = Problem::builder().heads(hkv * group).kv_heads(hkv).key_dim(dk).value_dim(dv)
            .segment_len(n).update(if delta { Update::Delta } else { Update::Linear })
            .build().unwrap();
        let mut state = State::new(&p, lens.len()).unwrap();
        let slots: Vec<_> = (0..lens.len()).collect();
        call::<f32>(&mut state, 7, &slots, &lens, rope);
        let mut loaded = State::from_bytes(&state.to_bytes().unwrap()).unwrap();
        assert_same(&state, &loaded);
        let lens = vec![more; lens.len()];
        let a = call::<f32>(&mut state, 8, &slots, &lens, rope);
        let b = call::<f32>(&mut loaded, 8, &slots, &lens, rope);
        prop_assert_eq!(bits(&a), bits(&b));
        assert_same(&state, &loaded);
    }
}

#[test]
fn from_parts_takes_what_it_is_given() {
    let p = problem(Update::Delta, DType::F32);
    let (mut m, mut z) = (uniforms(1, 2 * 2 * 6 * 5), uniforms(2, 2 * 2 * 6));
    (m[0], z[0]) = (f32::NAN, f32::INFINITY);
    let state = State::from_parts(&p, &m, &z, &[40, 9], &[40, 8]).unwrap();
    assert_eq!((state.problem(), state.sequences()), (&p, 2));
    assert_eq!((state.tokens(0), state.committed(0), state.open_len(0)), (40, 40, 0));
    assert_eq!((state.tokens(1), state.committed(1), state.open_len(1)), (9, 8, 0));
    for (s, h, d) in [(0, 0, 0), (0, 1, 5), (1, 0, 3), (1, 1, 5)] {
        let row = (s * 2 + h) * 6 + d;
        assert_eq!(state.normalizer().at(&[s, h, d]).to_bits(), z[row].to_bits());
        for c in 0..5 {
            assert_eq!(state.memory().at(&[s, h, d, c]).to_bits(), m[row * 5 + c].to_bits());
        }
    }
    assert_same(&State::from_bytes(&state.to_bytes().unwrap()).unwrap(), &state);

    // The parts of a state without open segments make that state again, and it goes on alike.
    let mut through = State::new(&p, 2).unwrap();
    call::<f32>(&mut through, 1, &[0, 1], &[24, 16], false);
    let all = |s: usize| -> Vec<f32> {
        (0..60).map(|i| through.memory().at(&[s, i / 30, i / 5 % 6, i % 5])).collect()
    };
    let m = [all(0), all(1)].concat();
    let z: Vec<f32> =
        (0..24).map(|i| through.normalizer().at(&[i / 12, i / 6 % 2, i % 6])).collect();
    let mut again = State::from_parts(&p, &m, &z, &[24, 16], &[24, 16]).unwrap();
    assert_same(&through, &again);
    let a = call::<f32>(&mut through, 2, &[0, 1], &[11, 3], true);
    let b = call::<f32>(&mut again, 2, &[0, 1], &[11, 3], true);
    assert_eq!(bits(&a), bits(&b));
}

#[test]
fn from_parts_refuses_by_name() {
    let p = problem(Update::Delta, DType::F32);
    let (m, z) = (uniforms(1, 120), uniforms(2, 24));
    let error = |m: &[f32], z: &[f32], tokens: &[u64], committed: &[u64]| {
        State::from_parts(&p, m, z, tokens, committed).unwrap_err().to_string()
    };
    for (expected, got) in [
        ("memory: 119 elements given", error(&m[1..], &z, &[8, 8], &[8, 8])),
        ("memory: 120 elements given", error(&m, &z, &[8], &[8])),
        ("normalizer: 23 elements given", error(&m, &z[1..], &[8, 8], &[8, 8])),
        ("committed: 1 elements given, 2", error(&m, &z, &[8, 8], &[8])),
        ("committed[1]: 9 given, at most tokens[1] = 8", error(&m, &z, &[8, 8], &[8, 9])),
        ("tokens[0]: 9223372036854775808 given", error(&m, &z, &[1 << 63, 8], &[8, 8])),
        ("committed[0]: 0 given, at least 1", error(&m, &z, &[8, 8], &[0, 8])),
    ] {
        assert!(got.contains(expected), "{got:?} does not contain {expected:?}");
    }
    let zeros = State::from_parts(&p, &[0.0; 120], &[0.0; 24], &[8, 0], &[0, 0]).unwrap();
    assert_eq!((zeros.tokens(0), zeros.committed(0)), (8, 0));
}
