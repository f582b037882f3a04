//! Bytes that are no state are refused for the right reason and can do no harm.

use std::collections::HashMap;

use infini_attn::{DType, Error, Problem, State, Update};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView as Stored};

use crate::fuzz::targets::state_file::NAMES;
use crate::state_io::{assert_same, problem, varied};

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

/// A file taken apart, so that one thing in it can be changed with a right checksum.
#[derive(Clone)]
struct Parts {
    description: String,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

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
    let bytes = parts.describe("segment_len=1", "segment_len=131072").bytes();
    let error = State::from_bytes(&bytes).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { bytes, .. } if bytes >> 40 > 0), "{error:?}");

    // As many slots as lengths in bits can have, in a file of a header.
    let p = Problem::builder().head_dim(1).segment_len(1).build().unwrap();
    let text = Parts::of(&State::new(&p, 0).unwrap()).description;
    let slots = 1u64 << 57;
    let text = text.replace("sequences=0", &format!("sequences={slots}"));
    let mut end = 0;
    let mut tensor = |name: &str, dtype: &str, shape: &[u64], bytes: u64| {
        let start = end;
        end += bytes * shape.iter().product::<u64>();
        let offsets = [start, end];
        format!(r#","{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}"#)
            .replace(", ", ",")
    };
    let tensors = [
        tensor("committed", "U64", &[slots], 8),
        tensor("open_len", "U64", &[slots], 8),
        tensor("tokens", "U64", &[slots], 8),
        tensor("memory", "F32", &[slots, 1, 1, 1], 4),
        tensor("normalizer", "F32", &[slots, 1, 1], 4),
        tensor("open_keys", "F32", &[0, 1, 1], 4),
        tensor("open_keys_rotated", "F32", &[0, 1, 1], 4),
        tensor("open_values", "F32", &[0, 1, 1], 4),
        tensor("rotated", "U8", &[slots], 1),
    ];
    let json = format!(
        r#"{{"__metadata__":{{"infini_attn":"{text} crc32=00000000"}}{}}}"#,
        tensors.concat()
    );
    let reason = refused(&[&framed(&json)[..], &[0; 8]].concat());
    assert_eq!(reason, "truncated: 8 bytes of tensors, 4755801206503243776 expected");
}

/// A header as the container has it, padded to whole words.
fn framed(json: &str) -> Vec<u8> {
    let json = format!("{json:<width$}", width = json.len().next_multiple_of(8));
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()
}

#[test]
fn what_is_no_safetensors_file_is_called_that() {
    for len in 0..8 {
        let reason = refused(&b"truncat"[..len]);
        assert!(reason.starts_with("truncated, or not a safetensors file"), "{reason}");
    }
    let length = |n: u64| n.to_le_bytes().to_vec();
    for bytes in [
        b"This is a text file, and not a state.".to_vec(),
        br#"{"format": 1, "memory": []}"#.to_vec(),
        b"PK\x03\x04\x14\0\0\0\x08\0\0\0".to_vec(),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec(),
        [length(1 << 40), vec![b'{'; 8]].concat(),
        [length(u64::MAX), vec![b'{'; 8]].concat(),
        [length(4), b"abcd".to_vec()].concat(),
        [length(4), b"{abc".to_vec()].concat(),
        [length(90_000_000), b"abcdefgh".to_vec()].concat(),
        length(0),
    ] {
        let reason = refused(&bytes);
        assert!(reason.starts_with("not a safetensors file"), "{reason}");
    }
    // These could be: longer headers than a state has, and headers cut off.
    let reason = refused(&[length(90_000_000), vec![b'{'; 100]].concat());
    assert_eq!(reason, "header: 90000000 bytes, at most 16384 expected");
    for bytes in [length(100), [length(9), vec![b'{'; 8]].concat()] {
        let reason = refused(&bytes);
        assert!(reason.starts_with("truncated"), "{reason}");
    }
}

#[test]
fn what_save_never_writes_is_refused() {
    let state = varied::<f32>(&problem(Update::Delta, DType::F32));
    let bytes = state.to_bytes().unwrap();
    let end = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let json = std::str::from_utf8(&bytes[8..end]).unwrap().trim_end();
    assert_same(&State::from_bytes(&[&framed(json)[..], &bytes[end..]].concat()).unwrap(), &state);

    let rotated = &json[json.find(r#","rotated""#).unwrap()..json.len() - 1];
    let crc = &json[json.find("crc32=").unwrap() + 6..][..8];
    let edits = [
        // Fields in another spelling, twice, of another name.
        ("heads=4", "heads=+4"),
        ("heads=4", "heads=0004"),
        ("heads=4 ", "heads=4 heads=4 "),
        ("heads=4 ", "heads=2 heads=4 "),
        ("heads=4 ", "heads=4 colour=red "),
        ("heads=4 ", "heads=4  "),
        ("heads=4 kv_heads=2", "kv_heads=2 heads=4"),
        ("scale=4.08", "scale=04.08"),
        ("sequences=5", "sequences=+5"),
        ("sequences=5 ", "sequences=5 remark "),
        (crc, &*format!("+{crc}")),
        (crc, &*crc.to_uppercase()),
        // Tensors twice, or with more said about them.
        (rotated, &*format!("{rotated}{rotated}")),
        (
            rotated,
            &*format!(r#"{rotated},"rotated":{{"dtype":"U8","shape":[5],"data_offsets":[0,5]}}"#),
        ),
        (r#""dtype":"U8""#, r#""dtype":"U8","dtype":"U8""#),
        (r#""dtype":"U8""#, r#""dtype":"U8","remark":1"#),
        (r#""dtype":"U8""#, r#""dtype": "U8""#),
        (r#"{"infini_attn""#, r#"{"infini_attn":"","infini_attn""#),
        (r#"{"infini_attn""#, r#"{"remark":"","infini_attn""#),
        (r#"{"infini_attn""#, r#"{"infini\u005fattn""#),
    ];
    for (from, to) in edits.into_iter().filter(|(from, to)| from != to) {
        assert!(json.contains(from), "{from}");
        let edited = json.replacen(from, to, 1);
        let reason = refused(&[&framed(&edited)[..], &bytes[end..]].concat());
        assert!(reason.contains("header: "), "{to}: {reason}");
    }
    // Other padding.
    for spaces in [8, 16] {
        let reason =
            refused(&[&framed(&format!("{json}{:spaces$}", ""))[..], &bytes[end..]].concat());
        assert!(reason.contains("header: "), "{reason}");
    }
}

#[test]
fn the_format_stays() {
    let golden = include_bytes!("../golden/state.safetensors");
    let state = State::from_bytes(golden).unwrap();
    let open = [state.open_len(0), state.open_len(1)];
    assert_eq!((state.tokens(0), state.committed(1), open), (27, 8, [3, 2]));
    assert_eq!(state.memory().at(&[1, 1, 1, 0]), -0.125);
    assert!(state.to_bytes().unwrap() == golden);
}
