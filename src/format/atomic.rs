//! Writing several files of a directory so that each appears whole or not at all, and a failure changes nothing.
//!
//! Every file is written to a scratch file beside its place and synchronised to disk before any name changes. A single
//! file then takes its place by one rename. Where several files that belong together replace older ones, the old ones
//! are first moved aside, the last file before the others; the new ones take their places, the last file at the end.
//! A reader, or a crash, between the two sees no last file at all rather than one that belongs to other files; an
//! error moves everything back. Savers of one directory take turns where the system can lock a directory.
//!
//! A process that is killed leaves its scratch files, the old ones that it had moved aside among them. The next saver
//! that may overwrite removes them once its own files are in place.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempPath};

use super::disk;
use crate::{PeftError, Result};

/// What a file is to hold.
pub(super) enum Content<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// What this writes, piece by piece, so that it is never in memory as a whole.
    Stream(Fill<'a>),
}

/// What becomes of files that are there already.
#[derive(Clone, Copy)]
pub(super) enum Existing<'a> {
    /// They are an error.
    Keep,
    /// They are replaced.
    Replace,
    /// They are replaced if nothing speaks against it in this directory, which is looked at once no other saver writes to it.
    ReplaceIf(&'a dyn Fn(&Path) -> Result<()>),
}

impl From<bool> for Existing<'_> {
    fn from(overwrite: bool) -> Self {
        match overwrite {
            true => Self::Replace,
            false => Self::Keep,
        }
    }
}

/// Writes the content of a file.
pub(super) type Fill<'a> = Box<dyn FnOnce(&mut Scratch) -> Result<()> + 'a>;

/// A scratch file that is being filled.
pub(super) struct Scratch<'a> {
    file: &'a mut NamedTempFile,
    /// Whose place it will take.
    path: &'a Path,
}

impl Scratch<'_> {
    /// Appends `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        disk::write_all(self.file, bytes).map_err(PeftError::io(self.path))
    }
}

/// Writes `files`, names and contents, into `dir`, which is made with its parents where it is not there.
///
/// New files get ordinary modes (0666 less the umask), files that replace others keep theirs. A link in a file's place is
/// replaced, not followed. A file that is there with the same content is left alone.
///
/// # Errors
///
/// [`PeftError::Exists`] where a file is there and `overwrite` is false; [`PeftError::Io`] that names the path. Nothing
/// has changed then, and no scratch file or new directory is left.
pub(crate) fn write_files(dir: &Path, files: &[(&str, &[u8])], overwrite: bool) -> Result<()> {
    let files = files
        .iter()
        .map(|(name, content)| (*name, Content::Bytes(content)));
    write_contents(dir, files.collect(), None, overwrite)
}

/// As [`write_files`]; and files of `dir` whose names are `obsolete`, which would be taken for a part of what is written,
/// are an error too, or go if files are replaced.
pub(super) fn write_contents<'a>(
    dir: &Path,
    files: Vec<(&str, Content)>,
    obsolete: Option<&dyn Fn(&str) -> bool>,
    existing: impl Into<Existing<'a>>,
) -> Result<()> {
    let made = make_dirs(dir)?;
    let written = write_in(dir, files, obsolete, existing.into());
    if written.is_err() {
        remove_dirs(&made);
    }
    written
}

fn write_in(
    dir: &Path,
    files: Vec<(&str, Content)>,
    obsolete: Option<&dyn Fn(&str) -> bool>,
    existing: Existing,
) -> Result<()> {
    let turn = disk::lock(dir).map_err(PeftError::io(dir))?;
    let overwrite = match existing {
        Existing::Keep => false,
        Existing::Replace => true,
        Existing::ReplaceIf(check) => {
            check(dir)?;
            true
        }
    };
    let is_written = |name: &str| files.iter().any(|(written, _)| *written == name);
    let obsolete = match obsolete {
        Some(obsolete) => others(dir, |name| obsolete(name) && !is_written(name))?,
        None => Vec::new(),
    };
    if let Some(path) = obsolete.first().filter(|_| !overwrite) {
        return Err(PeftError::Exists { path: path.clone() });
    }
    let mut staged = Vec::with_capacity(files.len());
    for (name, content) in files {
        let path = dir.join(name);
        let old = disk::metadata(&path).map_err(PeftError::io(&path))?;
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
        if let (Some(old), Content::Bytes(content)) = (&old, &content)
            && old.len() == content.len() as u64
            && disk::holds(&path, content).map_err(PeftError::io(&path))?
        {
            continue;
        }
        let scratch = stage(dir, &path, content, old.map(|old| old.permissions()))?;
        staged.push((path, scratch));
    }
    commit(dir, staged, obsolete, overwrite)?;
    if overwrite && turn.is_some() {
        remove_stale(dir);
    }
    Ok(())
}

/// The paths in `dir` of the names that are `chosen`, sorted.
fn others(dir: &Path, chosen: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(PeftError::io(dir))? {
        let entry = entry.map_err(PeftError::io(dir))?;
        if entry.file_name().to_str().is_some_and(&chosen) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// A scratch file in `dir` with `content` on disk, for the place `path`.
fn stage(
    dir: &Path,
    path: &Path,
    content: Content,
    mode: Option<fs::Permissions>,
) -> Result<TempPath> {
    let mut scratch = disk::scratch(dir).map_err(PeftError::io(path))?;
    let mut filled = Scratch {
        file: &mut scratch,
        path,
    };
    match content {
        Content::Bytes(bytes) => filled.write(bytes)?,
        Content::Stream(write) => write(&mut filled)?,
    }
    if let Some(mode) = mode {
        disk::set_permissions(scratch.as_file(), mode).map_err(PeftError::io(path))?;
    }
    disk::sync(scratch.as_file()).map_err(PeftError::io(path))?;
    Ok(scratch.into_temp_path())
}

/// Gives the staged files their names, or changes nothing.
fn commit(
    dir: &Path,
    staged: Vec<(PathBuf, TempPath)>,
    obsolete: Vec<PathBuf>,
    overwrite: bool,
) -> Result<()> {
    let mut undo = Undo::default();
    match (&staged[..], &obsolete[..]) {
        ([], []) => {}
        ([(path, _)], []) if overwrite => undo.keep(dir, path).map_err(PeftError::io(path))?,
        _ if overwrite => {
            let staged = staged.iter().rev().map(|(path, _)| path);
            for path in staged.chain(&obsolete) {
                undo.move_aside(dir, path).map_err(PeftError::io(path))?;
            }
            disk::sync_dir(dir).map_err(PeftError::io(dir))?;
        }
        _ => {}
    }
    for (path, scratch) in staged {
        // After moving aside nothing is there, unless somebody just put it there; then the later save wins.
        disk::place(scratch, &path, overwrite).map_err(|(error, _)| match error.kind() {
            io::ErrorKind::AlreadyExists => PeftError::Exists { path: path.clone() },
            _ => PeftError::io(&path)(error),
        })?;
        undo.placed.push(path);
        disk::sync_dir(dir).map_err(PeftError::io(dir))?;
    }
    undo.forget();
    Ok(())
}

/// What to take back when it is dropped before [`forget`](Self::forget).
#[derive(Default)]
struct Undo {
    /// New files under their names.
    placed: Vec<PathBuf>,
    /// Old files under scratch names, the last file first.
    aside: Vec<(PathBuf, TempPath)>,
    /// A single old file, which is replaced where it stands, and its scratch name.
    kept: Option<(PathBuf, TempPath)>,
}

impl Undo {
    fn move_aside(&mut self, dir: &Path, path: &Path) -> io::Result<()> {
        if path.symlink_metadata().is_ok() {
            let scratch = disk::scratch(dir)?.into_temp_path();
            disk::rename(path, &scratch)?;
            self.aside.push((path.to_owned(), scratch));
        }
        Ok(())
    }

    /// Gives a file that is about to be replaced a second name, or copies it where a file has only one name. So it is under its own name
    /// until the new one is, whatever happens in between.
    fn keep(&mut self, dir: &Path, path: &Path) -> io::Result<()> {
        if path.symlink_metadata().is_err() {
            return Ok(());
        }
        let scratch = match disk::link(dir, path) {
            Ok(scratch) => scratch,
            Err(_) => disk::copy(dir, path)?,
        };
        self.kept = Some((path.to_owned(), scratch));
        Ok(())
    }

    /// Everything worked: the old files go.
    fn forget(mut self) {
        self.placed.clear();
        self.aside.clear();
        self.kept = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            // Not placed, it still has its name, and the scratch name goes.
            if self.placed.pop().is_some() {
                self.aside.push(kept);
            }
        }
        // A failure here has no one left to report to, the error that led here is on its way. But from the first on
        // nothing more is changed: an old last file beside new others would be a mixture.
        let mut placed = self.placed.drain(..).rev();
        let mut failed = placed.any(|path| disk::remove(&path).is_err());
        drop(placed);
        while let Some((path, scratch)) = self.aside.pop() {
            let kept = match failed {
                true => Err(scratch),
                false => disk::place(scratch, &path, true).map_err(|(_, scratch)| scratch),
            };
            if let Err(scratch) = kept {
                failed = true;
                // Better a scratch file with the old content than none.
                let _ = scratch.keep();
            }
        }
    }
}

/// Removes what killed savers left. Whoever has the directory's lock is its only saver, so nothing of this is in use.
fn remove_stale(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && entry.file_name().to_str().is_some_and(disk::is_scratch) {
            // The files are saved; one that cannot be removed is no reason to say otherwise.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Makes `dir` and its parents, so that they last through a loss of power, and returns those that were not there, the outermost first.
pub(super) fn make_dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let absent = |dir: &&Path| !dir.as_os_str().is_empty() && !dir.exists();
    let missing: Vec<_> = dir.ancestors().take_while(absent).collect();
    let mut made = Vec::with_capacity(missing.len());
    for dir in missing.into_iter().rev() {
        let created = disk::create_dir(dir).and_then(|()| {
            made.push(dir.to_owned());
            let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
            disk::sync_dir(parent.unwrap_or(Path::new(".")))
        });
        match created {
            Ok(()) => {}
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
pub(super) fn remove_dirs(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
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
