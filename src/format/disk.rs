//! The steps on a file system that saving is made of, one function each, so that a test can make any of them fail.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use tempfile::{Builder, NamedTempFile, TempPath};

/// Scratch files have names of their own, so that those of a killed process can be told from anybody's files.
const PREFIX: &str = ".burn-peft-";
const SUFFIX: &str = ".tmp";
/// Characters between them.
const RANDOM: usize = 8;
/// Bytes of a file that are compared at a time.
const PIECE: usize = 64 << 10;

/// Makes a directory.
pub(super) fn create_dir(dir: &Path) -> io::Result<()> {
    step()?;
    fs::create_dir(dir)
}

/// What is at `path`, links followed, or nothing.
pub(super) fn metadata(path: &Path) -> io::Result<Option<fs::Metadata>> {
    step()?;
    match fs::metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a file holds exactly these bytes; read piece by piece.
pub(super) fn holds(path: &Path, content: &[u8]) -> io::Result<bool> {
    step()?;
    let mut file = File::open(path)?;
    let mut piece = vec![0; PIECE.min(content.len()).max(1)];
    for expected in content.chunks(PIECE) {
        let found = &mut piece[..expected.len()];
        match file.read_exact(found) {
            Ok(()) if *found == *expected => {}
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(file.read(&mut piece[..1])? == 0)
}

/// Holds a directory until it is dropped; `None` where the system or the file system has no such locks.
#[cfg(unix)]
pub(super) fn lock(dir: &Path) -> io::Result<Option<File>> {
    step()?;
    let handle = File::open(dir)?;
    Ok(handle.lock().is_ok().then_some(handle))
}

/// Holds a directory until it is dropped, by a file in it that nobody else can open meanwhile and that goes when it is closed, also
/// when the process ends. `None` after a minute, or where no such file can be made.
#[cfg(windows)]
pub(super) fn lock(dir: &Path) -> io::Result<Option<File>> {
    use std::os::windows::fs::OpenOptionsExt;
    use std::time::{Duration, Instant};

    const GENERIC_WRITE_AND_DELETE: u32 = 0x4000_0000 | 0x0001_0000;
    const FILE_FLAG_DELETE_ON_CLOSE: u32 = 0x0400_0000;
    // Another holds it, or it is about to go.
    const ERROR_SHARING_VIOLATION: i32 = 32;
    const ERROR_ACCESS_DENIED: i32 = 5;
    step()?;
    let path = dir.join(format!("{PREFIX}lock{SUFFIX}"));
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let opened = File::options()
            .write(true)
            .create(true)
            .access_mode(GENERIC_WRITE_AND_DELETE)
            .share_mode(0)
            .custom_flags(FILE_FLAG_DELETE_ON_CLOSE)
            .open(&path);
        match opened {
            Ok(file) => return Ok(Some(file)),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(ERROR_SHARING_VIOLATION | ERROR_ACCESS_DENIED)
                ) && Instant::now() < end =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(_) => return Ok(None),
        }
    }
}

/// Such a system has no locks that are known here.
#[cfg(not(any(unix, windows)))]
pub(super) fn lock(_dir: &Path) -> io::Result<Option<File>> {
    Ok(None)
}

/// An empty scratch file, which is removed when it is dropped.
pub(super) fn scratch(dir: &Path) -> io::Result<NamedTempFile> {
    step()?;
    let mut builder = names();
    // The default, 0600, would keep a server of another user from reading the adapter. The umask still applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir)
}

/// A scratch name for the file at `path`, beside the one it has. The name is removed when it is dropped.
pub(super) fn link(dir: &Path, path: &Path) -> io::Result<TempPath> {
    step()?;
    has_links()?;
    let linked = names().make_in(dir, |scratch| fs::hard_link(path, scratch))?;
    Ok(linked.into_temp_path())
}

/// A copy of the file at `path` under a scratch name, on the disk. It is removed when it is dropped.
pub(super) fn copy(dir: &Path, path: &Path) -> io::Result<TempPath> {
    let mut scratch = scratch(dir)?;
    step()?;
    let mut file = File::open(path)?;
    io::copy(&mut file, &mut scratch)?;
    scratch
        .as_file()
        .set_permissions(file.metadata()?.permissions())?;
    sync(scratch.as_file())?;
    Ok(scratch.into_temp_path())
}

fn names() -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX).rand_bytes(RANDOM);
    builder
}

/// Whether `name` is one that [`scratch`] gives.
pub(super) fn is_scratch(name: &str) -> bool {
    let random = name
        .strip_prefix(PREFIX)
        .and_then(|name| name.strip_suffix(SUFFIX));
    random.is_some_and(|random| {
        random.len() == RANDOM && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
    })
}

/// Writes all of `content`.
pub(super) fn write_all(file: &mut NamedTempFile, content: &[u8]) -> io::Result<()> {
    if let Err(error) = step() {
        // As a full disk fails: somewhere in the middle.
        file.write_all(&content[..content.len() / 2])?;
        return Err(error);
    }
    file.write_all(content)
}

/// Sets a file's mode.
pub(super) fn set_permissions(file: &File, mode: fs::Permissions) -> io::Result<()> {
    step()?;
    file.set_permissions(mode)
}

/// Waits until a file's content is on the disk.
pub(super) fn sync(file: &File) -> io::Result<()> {
    step()?;
    file.sync_all()
}

/// Moves what is at `from` to `to`, over anything there.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step()?;
    fs::rename(from, to)
}

/// Gives a scratch file its name, over anything there if `overwrite` says so. It is given back on failure.
pub(super) fn place(
    scratch: TempPath,
    path: &Path,
    overwrite: bool,
) -> Result<(), (io::Error, TempPath)> {
    if let Err(error) = step() {
        return Err((error, scratch));
    }
    let placed = match overwrite {
        true => scratch.persist(path),
        false => scratch.persist_noclobber(path),
    };
    placed.map_err(|error| (error.error, error.path))
}

/// Removes a file.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    step()?;
    fs::remove_file(path)
}

/// Makes renames in `dir` last through a loss of power, where directories can be synchronised.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) {
        step()?;
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(not(test))]
#[inline(always)]
fn step() -> io::Result<()> {
    Ok(())
}

#[cfg(not(test))]
#[inline(always)]
fn has_links() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
use faults::{has_links, step};

/// What befalls the steps of this thread.
#[cfg(test)]
pub(super) mod faults {
    use std::cell::Cell;
    use std::io;

    /// Which steps fail, counted from 0.
    #[derive(Clone, Copy, Debug)]
    pub(in crate::format) enum Fault {
        /// These two, which may be the same.
        At(usize, usize),
        /// This one and all after it.
        From(usize),
        /// The process ends at this one, as if killed.
        Kill(usize),
    }

    thread_local! {
        static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
        static DONE: Cell<usize> = const { Cell::new(0) };
        static NO_LINKS: Cell<bool> = const { Cell::new(false) };
    }

    /// Fails on a file system without hard links.
    pub(super) fn has_links() -> io::Result<()> {
        match NO_LINKS.get() {
            false => Ok(()),
            true => Err(io::Error::from(io::ErrorKind::Unsupported)),
        }
    }

    /// Makes the file system of this thread one without hard links, or with them.
    pub(in crate::format) fn set_no_links(none: bool) {
        NO_LINKS.set(none);
    }

    pub(super) fn step() -> io::Result<()> {
        let n = DONE.replace(DONE.get() + 1);
        let fails = match FAULT.get() {
            None => false,
            Some(Fault::At(first, second)) => n == first || n == second,
            Some(Fault::From(first)) => n >= first,
            Some(Fault::Kill(at)) if n == at => std::process::exit(KILLED),
            Some(Fault::Kill(_)) => false,
        };
        match fails {
            false => Ok(()),
            true => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
    }

    /// What a process that a fault ended leaves as its status.
    pub(in crate::format) const KILLED: i32 = 77;

    /// Runs `save` under a fault and returns how many steps it came to, the failed ones included.
    pub(in crate::format) fn under<T>(
        fault: Option<Fault>,
        save: impl FnOnce() -> T,
    ) -> (T, usize) {
        FAULT.set(fault);
        DONE.set(0);
        let result = save();
        FAULT.set(None);
        (result, DONE.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_files_are_known_by_their_names_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = scratch(dir.path()).unwrap();
        assert!(is_scratch(
            file.path().file_name().unwrap().to_str().unwrap()
        ));
        for name in [
            "adapter_config.json",
            ".burn-peft-.tmp",
            ".burn-peft-notes.tmp",
            ".burn-peft-12345678",
            ".burn-peft-1234567_.tmp",
            "x.burn-peft-12345678.tmp",
            ".burn-peft-12345678.tmp~",
        ] {
            assert!(!is_scratch(name), "{name}");
        }
    }
}
