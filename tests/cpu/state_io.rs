//! Saving and loading: a loaded state continues bit for bit, and no file can do harm.

use std::collections::HashMap;

use half::bf16;

use crate::common::narrow;
use crate::common::stream::uniforms;
use infini_attn::{
    DType, Denominator, Element, EmptyMemory, Error, Inputs, Outputs, Problem, Rope, State,
    TensorView, TensorViewMut, Update, flush, prefill,
};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView as Stored};

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

fn problem(update: Update, dtype: DType) -> Problem {
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
fn varied<T: Element>(p: &Problem) -> State {
    let mut state = State::new(p, 5).unwrap();
    call::<T>(&mut state, 1, &[0, 3], &[21, 5], true);
    call::<T>(&mut state, 2, &[1, 2], &[12, 16], false);
    state
}

fn bits<T: Element>((o, lse): &(Vec<T>, Vec<f32>)) -> Vec<u8> {
    [bytemuck::cast_slice(o), bytemuck::cast_slice(lse)].concat()
}

fn assert_same(a: &State, b: &State) {
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

#[test]
fn io_errors_name_the_path() {
    let state = State::new(&problem(Update::Delta, DType::F32), 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no/such/folder/state");
    for (path, result) in [
        (missing.as_path(), state.save(&missing)),
        (missing.as_path(), State::load(&missing).map(drop)),
        // A folder can neither be replaced nor read.
        (folder.path(), state.save(folder.path())),
        (folder.path(), State::load(folder.path()).map(drop)),
    ] {
        match result {
            Err(e @ Error::Io { .. }) => {
                assert!(e.to_string().contains(path.to_str().unwrap()), "{e}");
            }
            other => panic!("{other:?}"),
        }
    }
    let garbage = folder.path().join("garbage");
    std::fs::write(&garbage, b"not a state").unwrap();
    let error = State::load(&garbage).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error:?}");
    assert!(error.to_string().contains(garbage.to_str().unwrap()), "{error}");
}

const CHILD: &str = "INFINI_ATTN_TEST_SAVE_TO";

/// Not a test of its own: what the next test runs in a process that dies half-way.
#[test]
#[ignore = "run by a_save_that_dies_leaves_the_old_file"]
fn save_a_large_state() {
    if let Ok(path) = std::env::var(CHILD) {
        let p = problem(Update::Delta, DType::F32);
        State::new(&p, 4096).unwrap().save(path).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn a_save_that_dies_leaves_the_old_file() {
    let p = problem(Update::Delta, DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let state = varied::<f32>(&p);
    state.save(&path).unwrap();
    let child = |limit: &str| {
        let test = std::env::current_exe().unwrap();
        std::process::Command::new("sh")
            .args(["-c", &format!("ulimit -f {limit}; exec \"$0\" \"$@\"")])
            .arg(test)
            .args(["--exact", "state_io::save_a_large_state", "--ignored"])
            .env(CHILD, &path)
            .output()
            .unwrap()
            .status
    };
    // At most 64 KiB may be written; the state needs more than 1 MiB.
    assert!(!child("64").success());
    assert_same(&State::load(&path).unwrap(), &state);
    // Without the limit the same child replaces the file.
    assert!(child("unlimited").success());
    assert_eq!(State::load(&path).unwrap().sequences(), 4096);
}

#[test]
fn saving_leaves_nothing_else_behind() {
    let state = varied::<f32>(&problem(Update::Delta, DType::F32));
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        state.save(folder.path().join("state")).unwrap();
    }
    let names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["state"]);
}

fn refused(bytes: &[u8]) -> String {
    match State::from_bytes(bytes) {
        Err(Error::Format { path, reason }) if path == "<bytes>" => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_truncation_is_refused() {
    let bytes = varied::<f32>(&problem(Update::Delta, DType::F32)).to_bytes().unwrap();
    (0..bytes.len()).for_each(|len| drop(refused(&bytes[..len])));
    refused(&[&bytes[..], &[0]].concat());
    refused(&[&bytes[..], &bytes[..]].concat());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn flipped_bytes_are_refused(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..6),
    ) {
        let state = varied::<f32>(&problem(Update::Delta, DType::F32));
        let original = state.to_bytes().unwrap();
        let mut bytes = original.clone();
        flips.iter().for_each(|(at, x)| *at.get_mut(&mut bytes) ^= x);
        match State::from_bytes(&bytes) {
            Err(Error::Format { .. }) => {}
            Err(e) => prop_assert!(false, "{e:?}"),
            // Only the padding of the header may change unnoticed, or two flips may cancel.
            Ok(loaded) => prop_assert_eq!(loaded.to_bytes().unwrap(), original),
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        refused(&bytes);
        refused(&[&(bytes.len() as u64).to_le_bytes()[..], &bytes].concat());
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

/// A file taken apart, so that one thing in it can be changed with a right checksum.
#[derive(Clone)]
struct Parts {
    description: String,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

const NAMES: [&str; 9] = [
    "memory",
    "normalizer",
    "tokens",
    "committed",
    "open_len",
    "rotated",
    "open_keys",
    "open_values",
    "open_keys_rotated",
];

impl Parts {
    fn of(state: &State) -> Self {
        let bytes = state.to_bytes().unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let text = &header.metadata().as_ref().unwrap()["infini_attn"];
        let tensor = |name: &str| {
            let t = file.tensor(name).unwrap();
            (name.to_string(), t.dtype(), t.shape().to_vec(), t.data().to_vec())
        };
        let (description, _) = text.split_once(" crc32=").unwrap();
        Parts { description: description.to_string(), tensors: NAMES.map(tensor).to_vec() }
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }

    fn set(mut self, name: &str, index: usize, value: u64) -> Self {
        self.tensor(name).3[8 * index..][..8].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn describe(mut self, from: &str, to: &str) -> Self {
        assert!(self.description.contains(from), "{}", self.description);
        self.description = self.description.replace(from, to);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut crc = crc32fast::Hasher::new();
        crc.update(self.description.as_bytes());
        self.tensors.iter().for_each(|t| crc.update(&t.3));
        self.with_metadata(&format!("{} crc32={:08x}", self.description, crc.finalize()))
    }

    fn with_metadata(&self, text: &str) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(n, d, s, b)| (n.as_str(), Stored::new(*d, s.clone(), b).unwrap()));
        let metadata = HashMap::from([("infini_attn".to_string(), text.to_string())]);
        safetensors::serialize(views, Some(metadata)).unwrap()
    }
}

#[test]
fn inconsistent_files_are_refused_for_the_right_reason() {
    let state = varied::<f32>(&problem(Update::Delta, DType::F32));
    let parts = Parts::of(&state);
    assert_same(&State::from_bytes(&parts.bytes()).unwrap(), &state);

    let edit = |f: &dyn Fn(&mut Parts)| {
        let mut parts = parts.clone();
        f(&mut parts);
        parts
    };
    let text = |from, to| parts.clone().describe(from, to);
    let set = |name, index, value| parts.clone().set(name, index, value);
    // Slot 0 stands at 21 tokens, 16 committed, 5 open and rotated; slot 4 is untouched.
    for (expected, broken) in [
        ("no `format`", text("format=1 ", "")),
        ("format = 2, 1 expected", text("format=1 ", "format=2 ")),
        ("metadata: heads: nothing given", text(" heads=4", "")),
        ("metadata: heads: 0 given", text(" heads=4", " heads=0")),
        ("metadata: kv_heads: 3 given", text("kv_heads=2", "kv_heads=3")),
        ("metadata: update: bogus given", text("update=delta", "update=bogus")),
        ("metadata: scale: NaN given", text("scale=", "scale=NaN oldscale=")),
        ("no `sequences`", text(" sequences=5", "")),
        ("sequences = -1", text("sequences=5", "sequences=-1")),
        ("memory: F32 [5, 2, 6, 5], F32 [6, 2, 6, 5] expected", text("sequences=5", "sequences=6")),
        ("[18446744073709551615, 2", text("sequences=5", "sequences=18446744073709551615")),
        ("memory: F32 [5, 2, 6, 5], F32 [5, 2, 7, 5]", text("key_dim=6", "key_dim=7")),
        ("less than segment_len = 4", text("segment_len=8", "segment_len=4")),
        ("no tensor `open_len`", edit(&|p| p.tensors.retain(|t| t.0 != "open_len"))),
        ("no tensor `memory`", edit(&|p| p.tensors.retain(|t| t.0 != "memory"))),
        (
            "unexpected tensor `other`",
            edit(&|p| {
                p.tensors.push(("other".into(), Dtype::U8, vec![1], vec![0]));
            }),
        ),
        ("memory: I32", edit(&|p| p.tensor("memory").1 = Dtype::I32)),
        ("memory: F32 [300]", edit(&|p| p.tensor("memory").2 = vec![300])),
        ("open_values: F32 [14, 10, 1]", edit(&|p| p.tensor("open_values").2 = vec![14, 10, 1])),
        ("open_keys: 14 rows, 13 expected", set("open_len", 1, 3)),
        ("open_keys_rotated: 10 rows, 5 expected", edit(&|p| p.tensor("rotated").3[0] = 0)),
        ("rotated[0]: 2", edit(&|p| p.tensor("rotated").3[0] = 2)),
        ("rotated[4]: 1 with open_len = 0", edit(&|p| p.tensor("rotated").3[4] = 1)),
        ("open_len[0]: 8 given", set("open_len", 0, 8)),
        ("open_len[0]: 18446744073709551615 given", set("open_len", 0, u64::MAX)),
        ("open_len[4]: 1 given, at most tokens[4] − committed[4] = 0", set("open_len", 4, 1)),
        ("open_len[0]: 5 given", set("committed", 0, 17)),
        ("committed[0]: 22 given, at most tokens[0] = 21", set("committed", 0, 22)),
        ("committed[0]: 0 given", set("committed", 0, 0)),
        ("tokens[0]: 18446744073709551615 given", set("tokens", 0, u64::MAX)),
    ] {
        let reason = refused(&broken.bytes());
        assert!(reason.contains(expected), "{reason:?} does not contain {expected:?}");
    }
    let none = safetensors::serialize(Vec::<(String, Stored<'_>)>::new(), None).unwrap();
    assert_eq!(refused(&none), "no `infini_attn` entry in the metadata");
}

#[test]
fn a_changed_tensor_is_refused_by_the_checksum() {
    let state = varied::<f32>(&problem(Update::Delta, DType::F32));
    let parts = Parts::of(&state);
    for name in NAMES {
        let mut bytes = parts.bytes();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor(name).unwrap().data();
        let at = data.as_ptr() as usize - bytes.as_ptr() as usize;
        bytes[at] ^= 1;
        assert!(refused(&bytes).starts_with("corrupt: checksum"), "{name}");
    }
    let text = &parts.description;
    assert!(refused(&parts.with_metadata(text)).contains("no `crc32`"));
    let reason = refused(&parts.with_metadata(&format!("{text} crc32=xyz")));
    assert_eq!(reason, "metadata: crc32 = xyz is not a number");
}

#[test]
fn extents_far_beyond_the_file_are_refused() {
    // 2^21 heads with a memory of one number each: 16 MiB. Their open segments of up to 2^17 tokens
    // would take 2 TiB.
    let heads = 1 << 21;
    let p = Problem::builder().heads(heads).head_dim(1).segment_len(1).build().unwrap();
    let parts = Parts::of(&State::new(&p, 1).unwrap());
    let reason = refused(&parts.describe("segment_len=1", "segment_len=131072").bytes());
    assert!(reason.contains("what fits into this machine's memory"), "{reason}");

    // Headers that claim more than a 64-bit length can hold, within small files.
    let tensor = |name: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{from},{to}]}}"#, to - from)
    };
    let step = (1u64 << 61) - 1;
    let all: Vec<_> = (0..8).map(|i| tensor(&format!("t{i}"), i * step, (i + 1) * step)).collect();
    for tensors in [&all[..1], &all[..]] {
        let header = format!("{{{}}}", tensors.join(","));
        let length = (header.len() as u64).to_le_bytes();
        let reason = refused(&[&length[..], header.as_bytes(), &[0; 8]].concat());
        assert!(reason.starts_with("truncated: 8 bytes of tensors"), "{reason}");
    }
    for length in [9, 1 << 40, u64::MAX - 7, u64::MAX] {
        let reason = refused(&[&length.to_le_bytes()[..], &[b'{'; 8]].concat());
        assert!(reason.starts_with("truncated: header"), "{reason}");
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
