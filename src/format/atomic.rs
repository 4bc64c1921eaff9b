//! Writing several files of a directory so that each appears whole or not at all, and a failure changes nothing.
//!
//! Every file is written to a scratch file beside its place and synchronised to disk before any name changes. A single
//! file then takes its place by one rename. Where several files that belong together replace older ones, the old ones
//! are first moved aside, the last file before the others; the new ones take their places, the last file at the end.
//! A reader, or a crash, between the two sees no last file at all rather than one that belongs to other files; an
//! error moves everything back. Savers of one directory take turns where the system can lock a directory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempPath};

use crate::{PeftError, Result};

/// Writes `files`, names and contents, into `dir`, which is made with its parents where it is not there.
///
/// New files get ordinary modes (0666 less the umask), files that replace others keep theirs. A file that is there with
/// the same content is left alone.
///
/// # Errors
///
/// [`PeftError::Exists`] where a file is there and `overwrite` is false; [`PeftError::Io`] that names the path. Nothing
/// has changed then, and no scratch file or new directory is left.
pub(crate) fn write_files(dir: &Path, files: &[(&str, &[u8])], overwrite: bool) -> Result<()> {
    let made = make_dirs(dir)?;
    let written = write_in(dir, files, overwrite);
    if written.is_err() {
        remove_dirs(&made);
    }
    written
}

fn write_in(dir: &Path, files: &[(&str, &[u8])], overwrite: bool) -> Result<()> {
    let _turn = lock(dir)?;
    let mut staged = Vec::with_capacity(files.len());
    for (name, content) in files {
        let path = dir.join(name);
        let old = match fs::metadata(&path) {
            Ok(old) => Some(old),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(PeftError::io(&path)(error)),
        };
        match &old {
            Some(_) if !overwrite => return Err(PeftError::Exists { path }),
            Some(old) if !old.is_file() => {
                return Err(PeftError::Malformed {
                    path,
                    reason: "not a regular file".to_owned(),
                });
            }
            _ => {}
        }
        let same_length = old
            .as_ref()
            .is_some_and(|old| old.len() == content.len() as u64);
        if same_length && fs::read(&path).map_err(PeftError::io(&path))? == *content {
            continue;
        }
        let scratch =
            stage(dir, content, old.map(|old| old.permissions())).map_err(PeftError::io(&path))?;
        staged.push((path, scratch));
    }
    commit(dir, staged, overwrite)
}

/// A scratch file in `dir` with `content` on disk.
fn stage(dir: &Path, content: &[u8], mode: Option<fs::Permissions>) -> io::Result<TempPath> {
    let mut scratch = scratch_file(dir)?;
    scratch.write_all(content)?;
    if let Some(mode) = mode {
        scratch.as_file().set_permissions(mode)?;
    }
    scratch.as_file().sync_all()?;
    Ok(scratch.into_temp_path())
}

/// An empty scratch file, which is removed when it is dropped.
fn scratch_file(dir: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(".adapter-");
    // The default, 0600, would keep a server of another user from reading the adapter. The umask still applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir)
}

/// Gives the staged files their names, or changes nothing.
fn commit(dir: &Path, staged: Vec<(PathBuf, TempPath)>, overwrite: bool) -> Result<()> {
    let mut undo = Undo::default();
    if staged.len() > 1 && overwrite {
        for (path, _) in staged.iter().rev() {
            undo.move_aside(dir, path).map_err(PeftError::io(path))?;
        }
        sync_dir(dir)?;
    }
    for (path, scratch) in staged {
        // After moving aside nothing is there, unless somebody just put it there; then the later save wins.
        let placed = match overwrite {
            true => scratch.persist(&path),
            false => scratch.persist_noclobber(&path),
        };
        placed.map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists => PeftError::Exists { path: path.clone() },
            _ => PeftError::io(&path)(error.error),
        })?;
        undo.placed.push(path);
        sync_dir(dir)?;
    }
    undo.forget();
    Ok(())
}

/// What to take back when it is dropped before [`forget`](Self::forget).
#[derive(Default)]
struct Undo {
    /// New files under their names.
    placed: Vec<PathBuf>,
    /// Old files under scratch names.
    aside: Vec<(PathBuf, TempPath)>,
}

impl Undo {
    fn move_aside(&mut self, dir: &Path, path: &Path) -> io::Result<()> {
        if path.exists() {
            let scratch = scratch_file(dir)?.into_temp_path();
            fs::rename(path, &scratch)?;
            self.aside.push((path.to_owned(), scratch));
        }
        Ok(())
    }

    /// Everything worked: the old files go.
    fn forget(mut self) {
        self.placed.clear();
        self.aside.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for path in self.placed.drain(..) {
            // A failure here has no one left to report to; the error that led here is on its way.
            let _ = fs::remove_file(path);
        }
        while let Some((path, scratch)) = self.aside.pop() {
            if let Err(error) = scratch.persist(path) {
                // Better a scratch file with the old content than none.
                let _ = error.path.keep();
            }
        }
    }
}

/// Makes `dir` and its parents and returns those that were not there, the outermost first.
fn make_dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let absent = |dir: &&Path| !dir.as_os_str().is_empty() && !dir.exists();
    let missing: Vec<_> = dir.ancestors().take_while(absent).collect();
    let mut made = Vec::with_capacity(missing.len());
    for dir in missing.into_iter().rev() {
        match fs::create_dir(dir) {
            Ok(()) => made.push(dir.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                remove_dirs(&made);
                return Err(PeftError::io(dir)(error));
            }
        }
    }
    Ok(made)
}

/// Removes directories as far as they are empty, the innermost first.
fn remove_dirs(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}

/// Holds the directory until it is dropped. Systems and file systems without such locks go without.
fn lock(dir: &Path) -> Result<Option<File>> {
    if !cfg!(unix) {
        return Ok(None);
    }
    let handle = File::open(dir).map_err(PeftError::io(dir))?;
    Ok(handle.lock().is_ok().then_some(handle))
}

/// Makes renames in `dir` last through a loss of power, where directories can be synchronised.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(PeftError::io(dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files under `dir`, sorted by name, with their contents.
    fn content(dir: &Path) -> Vec<(String, String)> {
        let mut files: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read_to_string(entry.path()).unwrap_or_default())
            })
            .collect();
        files.sort();
        files
    }

    fn pairs(files: &[(&str, &str)]) -> Vec<(String, String)> {
        files
            .iter()
            .map(|&(name, text)| (name.to_owned(), text.to_owned()))
            .collect()
    }

    #[test]
    fn files_and_directories_are_made_and_replaced_only_when_asked() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("a/b");
        write_files(&dir, &[("w", b"1"), ("c", b"1")], false).unwrap();
        assert_eq!(content(&dir), pairs(&[("c", "1"), ("w", "1")]));

        let error = write_files(&dir, &[("w", b"2"), ("c", b"2")], false).unwrap_err();
        assert!(
            matches!(&error, PeftError::Exists { path } if path.ends_with("w")),
            "{error}"
        );
        assert_eq!(content(&dir), pairs(&[("c", "1"), ("w", "1")]));

        write_files(&dir, &[("w", b"2"), ("c", b"2")], true).unwrap();
        assert_eq!(content(&dir), pairs(&[("c", "2"), ("w", "2")]));
        write_files(&dir, &[("w", b"3"), ("c", b"2")], true).unwrap();
        assert_eq!(content(&dir), pairs(&[("c", "2"), ("w", "3")]));
    }

    #[test]
    fn a_single_file_that_is_there_is_enough_to_refuse() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("c"), "old").unwrap();
        let error = write_files(scratch.path(), &[("w", b"2"), ("c", b"2")], false).unwrap_err();
        assert!(
            matches!(&error, PeftError::Exists { path } if path.ends_with("c")),
            "{error}"
        );
        assert_eq!(content(scratch.path()), pairs(&[("c", "old")]));
    }

    /// A name below a directory that is not there can be staged and then not be placed: a failure half way.
    const UNPLACEABLE: &str = "none/c";

    #[test]
    fn a_failure_half_way_leaves_nothing_behind() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("a/b");
        for overwrite in [false, true] {
            let error =
                write_files(&dir, &[("w", b"1"), (UNPLACEABLE, b"1")], overwrite).unwrap_err();
            assert!(
                matches!(&error, PeftError::Io { path, .. } if path.ends_with(UNPLACEABLE)),
                "{error}"
            );
            assert_eq!(content(scratch.path()), []);
        }
    }

    #[test]
    fn a_failure_half_way_leaves_the_old_files_as_they_were() {
        let scratch = tempfile::tempdir().unwrap();
        let old = pairs(&[("c", "old"), ("w", "old")]);
        for (name, text) in &old {
            fs::write(scratch.path().join(name), text).unwrap();
        }
        let files: [(&str, &[u8]); 3] = [("w", b"new"), (UNPLACEABLE, b"new"), ("c", b"new")];
        assert!(write_files(scratch.path(), &files, true).is_err());
        assert_eq!(content(scratch.path()), old);
    }

    #[test]
    fn a_directory_in_the_place_of_a_file_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("c")).unwrap();
        for overwrite in [false, true] {
            assert!(write_files(scratch.path(), &[("w", b"1"), ("c", b"1")], overwrite).is_err());
            assert_eq!(content(scratch.path()), pairs(&[("c", "")]));
        }
    }

    #[test]
    fn a_file_in_the_place_of_the_directory_is_an_error_that_names_it() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("file"), "old").unwrap();
        let error =
            write_files(&scratch.path().join("file/dir"), &[("w", b"1")], true).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
        assert_eq!(content(scratch.path()), pairs(&[("file", "old")]));
    }

    #[cfg(unix)]
    #[test]
    fn modes_are_ordinary_and_those_of_replaced_files_are_kept() {
        use std::os::unix::fs::PermissionsExt;

        let scratch = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let metadata = fs::metadata(scratch.path().join(name)).unwrap();
            metadata.permissions().mode() & 0o777
        };
        fs::write(scratch.path().join("ordinary"), "").unwrap();
        write_files(scratch.path(), &[("w", b"1")], false).unwrap();
        assert_eq!(mode("w"), mode("ordinary"));

        fs::set_permissions(scratch.path().join("w"), fs::Permissions::from_mode(0o640)).unwrap();
        write_files(scratch.path(), &[("w", b"2"), ("c", b"2")], true).unwrap();
        assert_eq!(mode("w"), 0o640);
        assert_eq!(mode("c"), mode("ordinary"));
    }

    /// Without the turns, one saver's first file could end up beside the other's last.
    #[cfg(unix)]
    #[test]
    fn of_two_savers_one_wins_whole() {
        let scratch = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for saver in [b"1", b"2", b"3"] {
                let dir = scratch.path();
                scope.spawn(move || {
                    for _ in 0..20 {
                        write_files(dir, &[("w", saver), ("c", saver)], true).unwrap();
                    }
                });
            }
        });
        let files = content(scratch.path());
        assert_eq!(files.len(), 2, "{files:?}");
        assert_eq!(files[0].1, files[1].1);
    }
}
