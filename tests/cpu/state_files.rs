//! What saving does to files, and what it leaves.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use infini_attn::{DType, Error, State, Update};
use tempfile::{TempDir, tempdir};

use crate::state_io::{assert_same, problem, varied};

fn state(sequences: usize) -> State {
    State::new(&problem(Update::Delta, DType::F32), sequences).unwrap()
}

fn names(folder: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The error number, once the error is about just this path.
fn number(path: &Path, result: infini_attn::Result<()>) -> Option<i32> {
    match result {
        Err(Error::Io { path: named, source }) => {
            assert_eq!(named, path.to_str().unwrap());
            assert!(!source.to_string().contains("infini"), "{source}");
            source.raw_os_error()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn io_errors_have_the_path_and_the_systems_number() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let [missing, file, below, long] =
        ["no/such/folder", "file", "file/below", &"n".repeat(300)].map(at);
    fs::write(&file, "not a state").unwrap();
    let (save, load) =
        (|path: &Path| state(1).save(path), |path: &Path| State::load(path).map(drop));
    for (path, number_expected) in [(&*missing, 2), (&*below, 20), (folder.path(), 21)] {
        assert_eq!(number(path, save(path)), Some(number_expected), "{path:?}");
        assert_eq!(number(path, load(path)), Some(number_expected), "{path:?}");
    }
    assert_eq!(number(&at("new/"), save(&at("new/"))), Some(20));
    assert_eq!(number(Path::new(""), save(Path::new(""))), Some(2));
    assert!(number(&long, save(&long)).is_some());
    #[cfg(target_os = "linux")]
    {
        std::os::unix::fs::symlink("loop", at("loop")).unwrap();
        assert_eq!(number(&at("loop"), save(&at("loop"))), Some(40));
        assert_eq!(number(&at("loop"), load(&at("loop"))), Some(40));
        fs::remove_file(at("loop")).unwrap();
    }
    let error = State::load(&file).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error:?}");
    assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
    assert_eq!(names(&folder), ["file"]);
}

const CHILD: &str = "INFINI_ATTN_TEST_SAVE_TO";

/// The named one of the tests below that save to a path, in a process of its own that a shell
/// prepares.
fn child(prepare: &str, test: &str, path: &Path) -> Command {
    let mut child = Command::new("sh");
    child
        .args(["-c", &format!("{prepare}; exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("state_files::{test}"), "--ignored", "--nocapture"])
        .env(CHILD, path);
    child
}

/// Not a test of its own: what others run in a process that dies half-way.
#[test]
#[ignore = "run by other tests"]
fn save_a_large_state() {
    if let Ok(path) = std::env::var(CHILD) {
        state(4096).save(path).unwrap();
    }
}

/// Not a test of its own either.
#[test]
#[ignore = "run by other tests"]
fn save_without_end() {
    if let Ok(path) = std::env::var(CHILD) {
        let states = [state(1), state(300)];
        loop {
            states.iter().for_each(|state| state.save(&path).unwrap());
        }
    }
}

#[cfg(unix)]
#[test]
fn a_save_that_dies_leaves_the_old_file() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("state");
    let state = varied::<f32>(&problem(Update::Delta, DType::F32));
    state.save(&path).unwrap();
    let save = |prepare| child(prepare, "save_a_large_state", &path).output().unwrap();
    // At most 64 KiB may be written; the state needs more than 1 MiB.
    assert!(!save("ulimit -f 64").status.success());
    assert_same(&State::load(&path).unwrap(), &state);
    #[cfg(target_os = "linux")]
    assert_eq!(names(&folder), ["state"]);
    // The same as an error.
    let refused = save("trap '' XFSZ; ulimit -f 64");
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains("code: 27"), "{text}");
    assert_same(&State::load(&path).unwrap(), &state);
    #[cfg(target_os = "linux")]
    assert_eq!(names(&folder), ["state"]);
    // Without the limit the same child replaces the file.
    assert!(save(":").status.success());
    assert_eq!(State::load(&path).unwrap().sequences(), 4096);
}

#[cfg(target_os = "linux")]
#[test]
fn a_killed_save_leaves_a_whole_state_and_at_most_one_file() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("state");
    for round in 0..12 {
        let mut child =
            child(":", "save_without_end", &path).stdout(Stdio::null()).spawn().unwrap();
        while !path.exists() {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_micros(30_000 + 1_700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!([1, 300].contains(&State::load(&path).unwrap().sequences()));
        assert!(names(&folder).len() <= 2, "{:?}", names(&folder));
        state(1).save(&path).unwrap();
        assert_eq!(names(&folder), ["state"]);
    }
    // The instant at which a file is left is short: the same by hand.
    fs::write(folder.path().join(".state.infini-attn.tmp"), "left").unwrap();
    state(2).save(&path).unwrap();
    assert_eq!(names(&folder), ["state"]);
}

#[test]
fn saves_of_several_threads_leave_whole_files() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("state");
    state(1).save(&path).unwrap();
    std::thread::scope(|scope| {
        for n in [1, 20, 30, 400] {
            let path = &path;
            scope.spawn(move || (0..100).for_each(|_| state(n).save(path).unwrap()));
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..300 {
                    let n = State::load(&path).unwrap().sequences();
                    assert!([1, 20, 30, 400].contains(&n), "{n}");
                    // Named files that a kill would leave for ever are not fallen back to.
                    let left = |name: &String| name.starts_with(".infini-attn-");
                    assert!(!cfg!(target_os = "linux") || !names(&folder).iter().any(left));
                }
            });
        }
    });
    assert_eq!(names(&folder), ["state"]);
}

#[test]
fn saving_leaves_nothing_else_behind() {
    let state = varied::<f32>(&problem(Update::Delta, DType::F32));
    let folder = tempdir().unwrap();
    for _ in 0..2 {
        state.save(folder.path().join("state")).unwrap();
    }
    assert_eq!(names(&folder), ["state"]);
    // A name that leaves no room for another derived from it.
    let long = "n".repeat(250);
    for _ in 0..2 {
        state.save(folder.path().join(&long)).unwrap();
    }
    assert_same(&State::load(folder.path().join(&long)).unwrap(), &state);
    assert_eq!(names(&folder), [&*long, "state"]);
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_written_into_and_stays() {
    use std::os::unix::fs::FileTypeExt;
    let folder = tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let state = varied::<f32>(&problem(Update::Delta, DType::F32));
    let bytes = state.to_bytes().unwrap();
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || fs::read(pipe).unwrap()
    });
    state.save(&pipe).unwrap();
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    assert!(reader.join().unwrap() == bytes);
    std::thread::scope(|scope| {
        scope.spawn(|| fs::write(&pipe, &bytes).unwrap());
        assert_same(&State::load(&pipe).unwrap(), &state);
        scope.spawn(|| fs::write(&pipe, &bytes[..bytes.len() - 1]).unwrap());
        let error = State::load(&pipe).unwrap_err().to_string();
        assert!(error.contains("truncated"), "{error}");
    });

    // A device of the test's own, where it may make and use one: the system's are not put at risk.
    let full = folder.path().join("full");
    let made = Command::new("mknod").arg(&full).args(["c", "1", "7"]).output().unwrap();
    if cfg!(target_os = "linux")
        && made.status.success()
        && fs::OpenOptions::new().write(true).open(&full).is_ok()
    {
        assert_eq!(number(&full, state.save(&full)), Some(28));
        assert!(fs::metadata(&full).unwrap().file_type().is_char_device());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn standard_output_is_written_into() {
    use std::io::{Read, Seek};
    use std::os::fd::AsRawFd;
    let output = child(":", "save_a_large_state", Path::new("/proc/self/fd/1")).output().unwrap();
    let bytes = state(4096).to_bytes().unwrap();
    assert!(output.status.success());
    // What the test's process says stands around it.
    let at = output.stdout.windows(16).position(|w| *w == bytes[..16]).unwrap();
    assert!(output.stdout[at..].starts_with(&bytes));

    // The same where it leads to a file that has no name any more.
    let mut file = tempfile::tempfile().unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    state(3).save(&path).unwrap();
    file.rewind().unwrap();
    let mut read = Vec::new();
    file.read_to_end(&mut read).unwrap();
    assert!(read == state(3).to_bytes().unwrap());
}

#[cfg(unix)]
#[test]
fn links_stay_and_lead_to_the_new_file() {
    use std::os::unix::fs::symlink;
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("deep")).unwrap();
    state(1).save(at("deep/file")).unwrap();
    symlink("deep/file", at("link")).unwrap();
    symlink(at("link"), at("chain")).unwrap();
    symlink("../new", at("deep/dangling")).unwrap();
    for (n, link, target) in
        [(2, "link", "deep/file"), (3, "chain", "deep/file"), (4, "deep/dangling", "new")]
    {
        let before = fs::read_link(at(link)).unwrap();
        for n in [n, n + 10] {
            state(n).save(at(link)).unwrap();
            assert_eq!(fs::read_link(at(link)).unwrap(), before);
            assert!(fs::symlink_metadata(at(target)).unwrap().is_file());
            assert_eq!(State::load(at(target)).unwrap().sequences(), n);
        }
    }
    assert_eq!(names(&folder), ["chain", "deep", "link", "new"]);
}

#[cfg(unix)]
#[test]
fn a_file_keeps_its_rights() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let folder = tempdir().unwrap();
    let path = folder.path().join("state");
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    assert!(child("umask 027", "save_a_large_state", &path).output().unwrap().status.success());
    assert_eq!(mode(), 0o640);
    for kept in [0o600, 0o604, 0o666, 0o444] {
        File::open(&path).unwrap().set_permissions(PermissionsExt::from_mode(kept)).unwrap();
        state(1).save(&path).unwrap();
        assert_eq!(mode(), kept);
    }
    // Root alone may make such a file.
    if chown(&path, Some(1234), Some(5678)).is_ok() {
        state(2).save(&path).unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.uid(), found.gid(), mode()), (1234, 5678, 0o444));
    }
}
