//! A file put in the place of another in one step.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;

/// Writes what the file is to hold; asked again where the first way to place it is barred.
type Contents<'a> = &'a dyn Fn(&mut dyn Write) -> io::Result<()>;

/// Writes a new file, syncs it and renames it to `path`, or to what links from there lead to. What is
/// no file is written into, and folders refuse that.
pub(super) fn write(path: &Path, contents: Contents) -> io::Result<()> {
    let found = match fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        found => Some(found?),
    };
    let mut target = path.to_owned();
    while let Ok(link) = fs::read_link(&target) {
        target = folder(&target).join(link);
    }
    // Links of `/proc/self/fd` can lead to a file that has no name any more. That the name found is
    // of the same file is not asked: another save may just have replaced it.
    let nameless = target != path && fs::symlink_metadata(&target).is_err();
    match found {
        Some(found) if nameless || !found.is_file() => write_into(path, contents),
        found => replace(&target, found.as_ref(), contents),
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn write_into(path: &Path, contents: Contents) -> io::Result<()> {
    let file = OpenOptions::new().write(true).truncate(true).open(path)?;
    fill(&file, contents)?;
    match file.sync_all() {
        // Pipes and terminals.
        Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
        synced => synced,
    }
}

fn fill(file: &File, contents: Contents) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(super::BUFFER, file);
    contents(&mut out)?;
    out.flush()
}

/// Fills a file that is to stand where `found` stood.
fn fill_new(file: &File, found: Option<&Metadata>, contents: Contents) -> io::Result<()> {
    fill(file, contents)?;
    found.map_or(Ok(()), |found| keep_rights(file, found))?;
    file.sync_all()
}

fn replace(target: &Path, found: Option<&Metadata>, contents: Contents) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    let placed = unnamed::place(target, found, contents)?;
    #[cfg(not(target_os = "linux"))]
    let placed = false;
    if !placed {
        place_named(target, found, contents)?;
    }
    // The rename lasts once the folder is synced.
    match File::open(folder(target)).and_then(|folder| folder.sync_all()) {
        // Some folders may be written but not read, some file systems sync none.
        Err(e) if [ErrorKind::PermissionDenied, ErrorKind::InvalidInput].contains(&e.kind()) => {
            Ok(())
        }
        synced => synced,
    }
}

/// How a new file is opened: with any file's mode, which the umask narrows, or private until it has
/// the old one's.
fn options(found: Option<&Metadata>) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(
        &mut options,
        if found.is_some() { 0o600 } else { 0o666 },
    );
    #[cfg(not(unix))]
    let _ = found;
    options
}

#[cfg(unix)]
fn keep_rights(file: &File, found: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    // Files can be given away by root alone, to groups also by their members.
    let kept = fchown(file, Some(found.uid()), Some(found.gid()))
        .or_else(|_| fchown(file, None, Some(found.gid())));
    let mode = found.mode() & 0o777;
    // Another group gets what everybody has.
    let mode = if kept.is_ok() { mode } else { mode & !0o070 | (mode & 0o007) << 3 };
    file.set_permissions(fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn keep_rights(_: &File, _: &Metadata) -> io::Result<()> {
    Ok(())
}

/// By way of a file with a name of its own, which stays if the process is killed.
fn place_named(target: &Path, found: Option<&Metadata>, contents: Contents) -> io::Result<()> {
    let file = tempfile::Builder::new()
        .prefix(".infini-attn-")
        .suffix(".tmp")
        .make_in(folder(target), |path| options(found).create_new(true).open(path))?;
    fill_new(file.as_file(), found, contents)?;
    file.persist(target).map_err(|e| e.error)?;
    Ok(())
}

/// By way of a file without a name, which goes with the process.
#[cfg(target_os = "linux")]
mod unnamed {
    use std::fs::{self, File, Metadata};
    use std::io::{self, ErrorKind};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, OFlags, linkat};

    use super::{Contents, fill_new, folder, options};

    /// False where the file system (or the want of `/proc`) bars this way.
    pub(super) fn place(
        target: &Path,
        found: Option<&Metadata>,
        contents: Contents,
    ) -> io::Result<bool> {
        // A name cannot be linked over, so the file gets another first. All saves to `target` use
        // the same one: what a killed save left there is removed by the next.
        let Some(name) = target.file_name() else { return Ok(false) };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".infini-attn.tmp");
        let hidden = folder(target).join(hidden);
        loop {
            let flags = OFlags::TMPFILE.bits() as i32;
            let Ok(file) = options(found).custom_flags(flags).open(folder(target)) else {
                return Ok(false);
            };
            fill_new(&file, found, contents)?;
            if !link_over(&file, &hidden) {
                return Ok(false);
            }
            match fs::rename(&hidden, target) {
                Ok(()) => return Ok(true),
                // Another save took the name in between. A file that was unlinked cannot be linked
                // again: this is rare enough to write another.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => {
                    let _ = fs::remove_file(&hidden);
                    return Err(e);
                }
            }
        }
    }

    /// Gives a file a name, whether or not there is one that has it. False where that is barred.
    fn link_over(file: &File, name: &Path) -> bool {
        let free = |error: io::Error| error.kind() == ErrorKind::NotFound;
        loop {
            match link(file, name) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                    if !fs::remove_file(name).map_or_else(free, |()| true) {
                        return false;
                    }
                }
                linked => return linked.is_ok(),
            }
        }
    }

    fn link(file: &File, name: &Path) -> io::Result<()> {
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(linkat(CWD, open, CWD, name, AtFlags::SYMLINK_FOLLOW)?)
    }
}
