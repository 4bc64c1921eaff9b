//! Whether files can be saved in a directory, asked before the work whose result is to be saved.

use std::io;
use std::path::Path;

use super::atomic::{make_dirs, remove_dirs};
use super::disk;
use crate::{PeftError, Result};

/// Checks that files can be written into `dir`, which need not be there yet.
///
/// Makes the directory with its parents, and a scratch file in it, as saving does, and removes all of them again. Call it before
/// training, so that a run does not end with an adapter that cannot be saved. It says nothing about files that are there already, nor
/// about how much space is left.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// # let scratch = tempfile::tempdir().unwrap();
/// # let dir = scratch.path().join("out/adapter");
/// burn_peft::format::check_writable(&dir)?; // dir: "out/adapter"
/// # assert!(!scratch.path().join("out").exists());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`PeftError::Io`] with the directory, or with the parent that cannot be made. Nothing has changed then.
pub fn check_writable(dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    // An empty path is the current directory, as it is for the system.
    let dir = match dir.as_os_str().is_empty() {
        true => Path::new("."),
        false => dir,
    };
    if dir.exists() && !dir.is_dir() {
        return Err(PeftError::io(dir)(io::ErrorKind::NotADirectory.into()));
    }
    let made = make_dirs(dir)?;
    let scratch = disk::scratch(dir).map(drop);
    remove_dirs(&made);
    // The error of the scratch file has its random name.
    scratch.map_err(|error| PeftError::io(dir)(error.kind().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    #[test]
    fn nothing_is_left_of_the_check() {
        let scratch = tempfile::tempdir().unwrap();
        check_writable(scratch.path()).unwrap();
        check_writable(scratch.path().join("a/b/c")).unwrap();
        assert_eq!(names(scratch.path()), Vec::<String>::new());
        check_writable("").unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        std::fs::write(&file, "old").unwrap();
        for dir in [file.clone(), file.join("below"), file.join("far/below")] {
            let error = check_writable(&dir).unwrap_err();
            let PeftError::Io { path, .. } = &error else {
                panic!("{error}");
            };
            assert!(path.starts_with(&file), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "old");
        assert_eq!(names(scratch.path()), ["file"]);
    }

    #[cfg(unix)]
    #[test]
    fn every_step_that_fails_is_an_error_and_leaves_nothing() {
        use super::disk::faults::{Fault, under};

        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("a/b");
        let (clean, steps) = under(None, || check_writable(&dir));
        clean.unwrap();
        assert!(steps >= 3, "{steps}");
        for step in 0..steps {
            let (checked, _) = under(Some(Fault::At(step, step)), || check_writable(&dir));
            assert!(checked.is_err(), "step {step}");
            assert_eq!(names(scratch.path()), Vec::<String>::new(), "step {step}");
        }
    }
}
