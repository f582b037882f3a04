//! State files are written and read without a second copy of the state, and small files cannot
//! make large claims.

use infini_attn::{
    Error, Inputs, Outputs, Problem, Rope, State, TensorView, TensorViewMut, prefill,
};

use crate::alone;
use crate::memory::ALLOCATED;

const MIB: usize = 1 << 20;

/// What `run` gives, and the bytes it allocates at its worst.
fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    let result = run();
    (result, ALLOCATED.peak_usage() - before)
}

/// Some 50 MiB, nearly all of it in open segments.
fn large() -> State {
    let problem = Problem::builder().segment_len(1024).build().expect("valid");
    let mut state = State::new(&problem, 64).unwrap();
    let (x, mut o) = (vec![0.25f32; 1000 * 64], vec![0.0f32; 1000 * 64]);
    let shape = [1, 1000, 1, 64];
    let view = TensorView::new(&x, &shape).expect("shape");
    let table = TensorView::new(&x[..32_000], &[1000, 32]).expect("shape");
    // One worker: the pool belongs to another test.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    for slot in 0..64 {
        let slots = [slot];
        let inputs = Inputs::new(view, view, view).slots(&slots).rope(Rope::new(table, table));
        let o = Outputs::new(TensorViewMut::new(&mut o, &shape).expect("shape"));
        pool.install(|| prefill(&problem, &inputs, &[0.0], &mut state, o)).expect("valid");
    }
    state
}

#[test]
fn files_take_no_second_copy_of_the_state() {
    let _alone = alone();
    let state = large();
    assert!(state.bytes() > 48 * MIB);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("state");
    let (saved, bytes) = peak(|| state.save(&path));
    println!("a state of {} bytes: {bytes} to save it", state.bytes());
    assert!(saved.is_ok() && bytes < MIB, "{saved:?}: {bytes} bytes");
    let (loaded, bytes) = peak(|| State::load(&path));
    println!("{bytes} to load it");
    let loaded = loaded.expect("just saved");
    assert!(bytes < state.bytes() + MIB, "{bytes} bytes");
    assert!(loaded.to_bytes().expect("valid") == state.to_bytes().expect("valid"));

    let other = Problem::builder().segment_len(1023).build().expect("valid");
    let (refused, bytes) = peak(|| State::load_for(&other, &path));
    assert!(matches!(refused, Err(Error::Problem { field: "segment_len", .. })), "{refused:?}");
    assert!(bytes < MIB, "{bytes} bytes");
}

#[test]
fn small_files_take_little_memory() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("state");
    let small = Problem::builder().head_dim(1).segment_len(1).build().expect("valid");
    let claim = |n: usize| small.to_builder().segment_len(n).build().expect("valid");

    // A state of 192 MiB in a file of 1 KiB, for which nobody asked.
    State::new(&claim(1 << 24), 1).unwrap().save(&path).expect("a folder");
    let (refused, bytes) = peak(|| State::load_for(&small, &path));
    assert!(matches!(refused, Err(Error::Problem { .. })) && bytes < MIB, "{bytes} bytes");
    // The same cut off.
    let all = std::fs::read(&path).expect("just saved");
    std::fs::write(&path, &all[..all.len() - 1]).expect("a folder");
    let (refused, bytes) = peak(|| State::load(&path));
    assert!(matches!(refused, Err(Error::Format { .. })) && bytes < MIB, "{bytes} bytes");

    // Headers of any length, of which the longest that are read are made of many small values.
    let names: String = (0..2000).map(|i| format!(r#""{i}":{{}},"#)).collect();
    for length in [16_000, 16_384, 90_000_000] {
        let json = format!(r#"{{"a":[{}1],{names}"b":0}}"#, "[],".repeat(4000));
        let mut file = (length as u64).to_le_bytes().to_vec();
        file.extend_from_slice(&json.as_bytes()[..json.len().min(length)]);
        std::fs::write(&path, &file).expect("a folder");
        let (refused, bytes) = peak(|| State::load(&path));
        assert!(matches!(refused, Err(Error::Format { .. })) && bytes < MIB, "{bytes} bytes");
    }
}
