//! The targets of cargo-fuzz (tests/fuzz) with seeds in place of coverage: the same bytes each time,
//! unless `INFINI_ATTN_FUZZ_SEED` says otherwise; `INFINI_ATTN_FUZZ_RUNS` times as many.

use std::collections::BTreeMap;

use infini_attn::{Problem, Update};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

#[path = "../fuzz/targets/mod.rs"]
pub(crate) mod targets;

use targets::Outcome;

fn variable(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// Runs a target `runs` times and counts what became of it; says which bytes it was that it died of.
fn fuzz(
    runs: u64,
    mut bytes: impl FnMut(&mut StdRng) -> Vec<u8>,
    target: fn(&[u8]) -> Outcome,
) -> BTreeMap<Outcome, u64> {
    let seed = variable("INFINI_ATTN_FUZZ_SEED", 1);
    let mut outcomes = BTreeMap::new();
    for run in 0..runs * variable("INFINI_ATTN_FUZZ_RUNS", 1) {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1 << 40).wrapping_add(run));
        let data = bytes(&mut rng);
        let told = Told { run, data: &data };
        *outcomes.entry(target(&data)).or_default() += 1;
        std::mem::forget(told);
    }
    outcomes
}

/// Says at a panic what led to it.
struct Told<'a> {
    run: u64,
    data: &'a [u8],
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        let folder = std::env::temp_dir().join(format!("infini-attn-fuzz-{}", self.run));
        _ = std::fs::write(&folder, self.data);
        eprintln!("run {}; its {} bytes are in {}", self.run, self.data.len(), folder.display());
    }
}

fn random(most: usize) -> impl Fn(&mut StdRng) -> Vec<u8> {
    move |rng| {
        let mut data = vec![0; rng.random_range(0..=most)];
        rng.fill_bytes(&mut data);
        data
    }
}

#[test]
fn calls() {
    let outcomes = fuzz(150_000, random(600), targets::call::run);
    assert!(
        outcomes[&Outcome::Accepted] > 15_000 && outcomes[&Outcome::Refused] > 15_000,
        "{outcomes:?}"
    );
}

#[test]
fn views() {
    let outcomes = fuzz(300_000, random(120), targets::view::run);
    assert!(outcomes[&Outcome::Accepted] > 30_000, "{outcomes:?}");
    assert!(outcomes[&Outcome::Refused] > 30_000, "{outcomes:?}");
}

#[test]
fn state_files() {
    let problem = |update| {
        let b = Problem::builder().heads(2).kv_heads(1).key_dim(2).value_dim(3).segment_len(3);
        b.update(update).build().expect("valid")
    };
    let [delta, linear] = [Update::Delta, Update::Linear].map(problem);
    let corpus = [
        targets::state_file::seed(&delta, 2),
        targets::state_file::seed(&linear, 1),
        targets::state_file::seed(&linear, 0),
        std::fs::read("tests/golden/state.safetensors").expect("a state"),
    ];
    for file in &corpus {
        assert_eq!(targets::state_file::right_checksum(file).as_ref(), Some(file));
    }
    let mutated = |rng: &mut StdRng| {
        let mut file = corpus[rng.random_range(0..corpus.len())].clone();
        for _ in 0..rng.random_range(0..4) {
            mutate(rng, &mut file);
        }
        file
    };
    let outcomes = fuzz(150_000, mutated, targets::state_file::run);
    assert!(
        outcomes[&Outcome::Accepted] > 15_000 && outcomes[&Outcome::Refused] > 15_000,
        "{outcomes:?}"
    );
}

/// Changes a byte, a digit, a field's end; removes, doubles or moves a part.
fn mutate(rng: &mut StdRng, file: &mut Vec<u8>) {
    if file.is_empty() {
        return;
    }
    let at = rng.random_range(0..file.len());
    let end = (at + rng.random_range(1..20)).min(file.len());
    match rng.random_range(0..7) {
        0 => file[at] ^= 1 << rng.random_range(0..8),
        1 => file[at] = rng.random(),
        2 => {
            let digits: Vec<_> = (0..file.len()).filter(|&i| file[i].is_ascii_digit()).collect();
            if !digits.is_empty() {
                let digit = digits[rng.random_range(0..digits.len())];
                file[digit] = b'0' + rng.random_range(0..10u8);
            }
        }
        3 => drop(file.drain(at..end)),
        4 => {
            let part = file[at..end].to_vec();
            file.splice(at..at, part);
        }
        5 => file.truncate(at),
        _ => {
            let (key, other) = ([&b" "[..], b",", b"\"", b"=", b"0"][rng.random_range(0..5)], at);
            file.splice(other..other, key.iter().copied());
        }
    }
}
