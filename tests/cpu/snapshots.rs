//! Snapshots as files.

use std::fs;
use std::io::Write;

use infini_attn::{Error, Pool, Snapshot, State};
use tempfile::tempdir;

use crate::common::model::{Entry, run_entry};
use crate::pool::{bytes, layers, tokens};

fn snapshot() -> Snapshot {
    let mut pool = Pool::<State>::new(&layers(), 3).unwrap();
    let slots = [(); 2].map(|()| pool.allocate().unwrap());
    let counts = [21, 6];
    let batch = [(slots[0], counts[0]), (slots[1], counts[1])];
    pool.step(&batch, |layers, slots| {
        for (l, layer) in layers.iter_mut().enumerate() {
            for (&slot, count) in slots.iter().zip(counts) {
                let stream = tokens(l, count, count as u64);
                let inputs = stream.inputs();
                run_entry(Entry::Forward, count, &inputs.slots(&[slot]), &[0.2; 2], layer);
            }
        }
        Ok::<(), Error>(())
    })
    .unwrap();
    pool.snapshot(&slots).unwrap()
}

#[test]
fn all_layers_come_back_from_one_file() {
    let (folder, snapshot) = (tempdir().unwrap(), snapshot());
    let path = folder.path().join("conversation");
    snapshot.save(&path).unwrap();
    for back in [Snapshot::load(&path), Snapshot::load_for(&layers(), &path)] {
        assert_eq!(bytes(&back.unwrap()), bytes(&snapshot));
    }
    // A layer is a state file in itself.
    let file = fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    for (i, layer) in snapshot.layers().iter().enumerate() {
        let tensor = tensors.tensor(&format!("layers.{i}")).unwrap();
        assert_eq!(
            State::from_bytes(tensor.data()).unwrap().to_bytes().unwrap(),
            layer.to_bytes().unwrap()
        );
    }
    let error = Snapshot::load_for(&layers()[..2], &path).unwrap_err().to_string();
    assert_eq!(error, "layers: 3 elements given, 2 (the layers of the model) expected");
    let mut others = layers();
    others.swap(1, 2);
    let error = Snapshot::load_for(&others, &path).unwrap_err();
    assert!(matches!(error, Error::Problem { field: "key_dim", .. }), "{error:?}");
    assert!(matches!(State::load(&path), Err(Error::Format { .. })));
}

#[cfg(unix)]
#[test]
fn from_a_pipe_too() {
    let (folder, snapshot) = (tempdir().unwrap(), snapshot());
    let (path, pipe) = (folder.path().join("file"), folder.path().join("pipe"));
    snapshot.save(&path).unwrap();
    let file = fs::read(&path).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::thread::scope(|scope| {
        scope.spawn(|| fs::OpenOptions::new().write(true).open(&pipe).unwrap().write_all(&file));
        assert_eq!(bytes(&Snapshot::load(&pipe).unwrap()), bytes(&snapshot));
    });
}

/// Whatever byte is changed and wherever the file ends, it is refused.
#[test]
fn damaged_files_are_refused() {
    let (folder, snapshot) = (tempdir().unwrap(), snapshot());
    let path = folder.path().join("file");
    snapshot.save(&path).unwrap();
    let file = fs::read(&path).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        match Snapshot::load(&path) {
            Err(Error::Format { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    };
    for at in (0..file.len()).step_by(61).chain(0..300) {
        let mut damaged = file.clone();
        damaged[at] ^= 0x11;
        refused(&damaged, &format!("byte {at}"));
    }
    for len in (0..file.len()).step_by(397) {
        refused(&file[..len], &format!("{len} bytes"));
    }
    refused(&[&file[..], &[0]].concat(), "a byte more");
    refused(&snapshot.layers()[0].to_bytes().unwrap(), "a state");
    // Spaces behind the header, which mean nothing.
    let space = 7 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    assert_eq!(file[space], b' ');
    let mut spelled = file.clone();
    spelled[space] = b'\n';
    refused(&spelled, "another spelling");
}
