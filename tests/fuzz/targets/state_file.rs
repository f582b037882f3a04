//! State files: bytes as they are, and with the checksum made right, so that what stands behind it is
//! reached. What is accepted is what `save` writes, and a state like any other.

use infini_attn::{
    Error, Inputs, Outputs, Problem, State, TensorView, TensorViewMut, flush, prefill,
};
use serde_json::Value;

use super::Outcome;

/// Larger states are only loaded.
const MOST_BYTES: usize = 1 << 20;

pub fn run(data: &[u8]) -> Outcome {
    let given = load(data);
    let mended = right_checksum(data).map_or(Outcome::Skipped, |mended| load(&mended));
    given.max(mended)
}

fn load(bytes: &[u8]) -> Outcome {
    match State::from_bytes(bytes) {
        Ok(state) => {
            assert!(state.to_bytes().expect("it was loaded") == bytes, "not what `save` writes");
            if state.bytes() <= MOST_BYTES {
                use_it(state);
            }
            Outcome::Accepted
        }
        Err(Error::Format { .. } | Error::OutOfMemory { .. }) => Outcome::Refused,
        Err(error) => panic!("an error of another kind: {error:?}"),
    }
}

fn use_it(mut state: State) {
    let slots: Vec<_> = (0..state.sequences()).collect();
    let twice = state.fork(&[&slots[..], &slots].concat()).expect("room");
    assert_eq!(twice.sequences(), 2 * slots.len());
    let before = state.to_bytes().expect("room");
    let seen: Vec<_> = slots.iter().map(|&slot| state.tokens(slot)).collect();
    let problem = *state.problem();
    match problem.dtype() {
        infini_attn::DType::F32 => step::<f32>(&mut state),
        infini_attn::DType::F16 => step::<half::f16>(&mut state),
        _ => step::<half::bf16>(&mut state),
    };
    for (&slot, &seen) in slots.iter().zip(&seen) {
        let now = state.tokens(slot);
        assert!(now == seen || now == seen + 2, "{seen} tokens, then {now}");
    }
    let same = slots.iter().zip(&seen).all(|(&slot, &seen)| state.tokens(slot) == seen);
    assert!(!same || slots.is_empty() || state.to_bytes().expect("room") == before);
    flush(&problem, &mut state, &slots).expect("slots of its own");
    state.reset(&slots).expect("slots of its own");
    let empty = State::new(&problem, slots.len()).expect("room");
    assert!(state.to_bytes().expect("room") == empty.to_bytes().expect("room"), "reset");
}

/// Two tokens for every slot; refused where an open segment came with rotation.
fn step<T: infini_attn::Element>(state: &mut State) {
    let p = *state.problem();
    let shape = |heads, dim| [state.sequences(), 2, heads, dim];
    let shapes = [
        shape(p.heads(), p.key_dim()),
        shape(p.kv_heads(), p.key_dim()),
        shape(p.kv_heads(), p.value_dim()),
        shape(p.heads(), p.value_dim()),
    ];
    let zeros = |shape: &[usize; 4]| vec![T::zeroed(); shape.iter().product()];
    let [q, k, v, mut o] = [0, 1, 2, 3].map(|i| zeros(&shapes[i]));
    let view = |data, i: usize| TensorView::new(data, &shapes[i]).expect("its shape");
    let inputs = Inputs::new(view(&q, 0), view(&k, 1), view(&v, 2));
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &shapes[3]).expect("its shape"));
    let gate = vec![0.0; p.heads()];
    _ = prefill(&p, &inputs, &gate, state, outputs);
}

/// Tensors of a state file, in the order of the checksum.
pub const NAMES: [&str; 9] = [
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

/// The same file with the checksum that it should have; none for what is no such file.
pub fn right_checksum(bytes: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (header, data) = rest.split_at_checked(length)?;
    let json: Value = serde_json::from_slice(header).ok()?;
    let text = json.get("__metadata__")?.get("infini_attn")?.as_str()?;
    let (description, _) = text.split_once(" crc32=")?;
    let mut sum = crc32fast::Hasher::new();
    sum.update(description.as_bytes());
    for name in NAMES {
        let offsets = json.get(name)?.get("data_offsets")?;
        let at = |i: usize| usize::try_from(offsets.get(i)?.as_u64()?).ok();
        sum.update(data.get(at(0)?..at(1)?)?);
    }
    let key = b" crc32=";
    let place = header.windows(key.len()).position(|window| window == key)? + key.len() + 8;
    let mut mended = bytes.to_vec();
    let digits = format!("{:08x}", sum.finalize());
    mended.get_mut(place..place + 8)?.copy_from_slice(digits.as_bytes());
    Some(mended)
}

/// A state to begin with, of a few slots and both kinds of open segments.
pub fn seed(problem: &Problem, slots: usize) -> Vec<u8> {
    let mut state = State::new(problem, slots).expect("room");
    step::<f32>(&mut state);
    state.to_bytes().expect("room")
}
