//! Checks of command lines: an argument that would fail at the end of a run, or be taken in silence, is refused by its name before the
//! run starts.
//!
//! Numbers and inputs are checked while the command line is parsed. Outputs are checked by [`Outputs`] once all arguments are known, as
//! that touches the disk, and as an output must not be an input.

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn_peft::format::check_writable;
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Command, Parser};

/// The small base model in the repository.
pub const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/base");

/// The training triples in the repository.
pub const TRIPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/train.jsonl");

/// Held-out text of the small base's own task, in the repository.
pub const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/pretrain_heldout.txt");

/// Most tokens, steps or rows that an argument may ask for: far beyond any use, and far from overflow.
pub const MOST: usize = 1 << 30;

/// The arguments of this process. Ends it with a message if they are not those of the program.
pub fn parse<A: Parser>() -> A {
    let mut matches = command(A::command()).get_matches();
    A::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.exit())
}

/// As [`parse`], for arguments that are given, the first of them the program's name.
///
/// Error: clap's, which names the argument.
pub fn parse_from<A: Parser>(arguments: &[&str]) -> Result<A, clap::Error> {
    let mut matches = command(A::command()).try_get_matches_from(arguments)?;
    A::from_arg_matches_mut(&mut matches)
}

/// The command, in which `--lr -1` is a value of `--lr` that its parser refuses, and no unknown argument `-1`.
fn command(command: Command) -> Command {
    command
        .mut_args(|arg| {
            let valued = arg.get_action().takes_values();
            arg.allow_negative_numbers(valued)
        })
        .mut_subcommands(self::command)
}

/// A whole number from `MIN` to `MAX`.
pub fn whole<const MIN: usize, const MAX: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (MIN..=MAX).contains(&number) => Ok(number),
        _ => Err(format!("expected a whole number from {MIN} to {MAX}")),
    }
}

/// A whole number that is at least 1.
pub fn count(text: &str) -> Result<usize, String> {
    whole::<1, MOST>(text)
}

/// A number above 0 that is not infinite.
pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("expected a finite number above 0".into()),
    }
}

/// As [`positive`], and neither zero nor infinite in f32.
pub fn positive_f32(text: &str) -> Result<f32, String> {
    match positive(text)? as f32 {
        number if number.is_normal() => Ok(number),
        _ => Err(format!(
            "expected a number from {:e} to {:e}",
            f32::MIN_POSITIVE,
            f32::MAX
        )),
    }
}

/// A probability below 1: at 1 dropout would drop everything.
pub fn dropout(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => Err("expected a probability, at least 0 and below 1".into()),
    }
}

/// A text that is not blank.
pub fn text(text: &str) -> Result<String, String> {
    match text.trim().is_empty() {
        true => Err("expected a text, found nothing but white space".into()),
        false => Ok(text.to_owned()),
    }
}

/// Names with commas between them, none of them empty.
pub fn names(text: &str) -> Result<String, String> {
    match text.split(',').any(|name| name.trim().is_empty()) {
        true => Err("expected names with commas between them, found an empty one".into()),
        false => Ok(text.to_owned()),
    }
}

/// A directory that is there.
pub fn directory() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path.is_dir() {
        true => Ok(path),
        false if path.exists() => Err("expected a directory, found a file"),
        false => Err("there is no such directory"),
    })
}

/// A file that is there and can be read.
pub fn file() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path.is_dir() {
        true => Err("expected a file, found a directory".into()),
        false => match fs::File::open(&path) {
            Ok(_) => Ok(path),
            Err(error) => Err(error.to_string()),
        },
    })
}

/// What a program will write, checked before its work: that it can be written, and that it is not what the program reads.
#[derive(Default)]
pub struct Outputs<'a> {
    inputs: Vec<(&'a str, &'a Path)>,
}

impl<'a> Outputs<'a> {
    /// Without inputs.
    pub fn new() -> Self {
        Self::default()
    }

    /// `option` is read from `path`, which nothing may be written over.
    pub fn with_input(mut self, option: &'a str, path: &'a Path) -> Self {
        self.inputs.push((option, path));
        self
    }

    /// Checks that files can be written into `dir`, which is made when it is needed.
    ///
    /// Error: it cannot be written, or it is an input.
    pub fn directory(&self, option: &str, dir: &Path) -> Result<(), String> {
        self.no_input(option, dir)?;
        check_writable(dir)
            .map_err(|error| format!("{option}: cannot be written, before any work: {error}"))
    }

    /// Checks that `path` can be written as a file, over an older one if there is one.
    ///
    /// Error: it cannot be written, it is a directory, or it is an input.
    pub fn file(&self, option: &str, path: &Path) -> Result<(), String> {
        self.no_input(option, path)?;
        let shown = path.display();
        if path.is_dir() || path.file_name().is_none() {
            return Err(format!(
                "{option}: {shown} is a directory: give the path of a file"
            ));
        }
        let written = match path.exists() {
            true => OpenOptions::new().append(true).open(path).map(drop),
            false => Ok(()),
        };
        written.map_err(|error| {
            format!("{option}: cannot be written, before any work: {shown}: {error}")
        })?;
        let parent = path.parent().unwrap_or(Path::new(""));
        check_writable(parent)
            .map_err(|error| format!("{option}: cannot be written, before any work: {error}"))
    }

    fn no_input(&self, option: &str, path: &Path) -> Result<(), String> {
        let same = |(_, input): &&(&str, &Path)| resolved(input) == resolved(path);
        match self.inputs.iter().find(same) {
            None => Ok(()),
            Some((input, _)) => Err(format!(
                "{option}: {} is what {input} is read from: choose another place, or it would be written over",
                path.display()
            )),
        }
    }
}

/// The path without links and dots as far as it is there.
fn resolved(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for known in absolute.ancestors() {
        if let (Ok(found), Ok(rest)) = (known.canonicalize(), absolute.strip_prefix(known)) {
            return found.join(rest);
        }
    }
    absolute
}

/// Ends a program: an error is shown in its own words, and makes the exit status 1.
pub fn exit<E: Into<Box<dyn Error>>>(outcome: Result<(), E>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.into());
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_no_input_by_any_path() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        fs::write(dir.join("in"), "").unwrap();
        let input = dir.join("in");
        let outputs = Outputs::new().with_input("--tokens", &input);
        assert!(outputs.file("--out", &dir.join("other")).is_ok());
        let relative = dir.join(".").join("none").join("..").join("in");
        fs::create_dir(dir.join("none")).unwrap();
        for path in [input.clone(), relative] {
            let error = outputs.file("--out", &path).unwrap_err();
            assert!(
                error.contains("--out") && error.contains("--tokens"),
                "{error}"
            );
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&input, dir.join("link")).unwrap();
            assert!(outputs.file("--out", &dir.join("link")).is_err());
        }
    }

    #[test]
    fn an_old_output_keeps_its_content_while_it_is_checked() {
        let scratch = tempfile::tempdir().unwrap();
        let old = scratch.path().join("old");
        fs::write(&old, "content").unwrap();
        Outputs::new().file("--out", &old).unwrap();
        assert_eq!(fs::read_to_string(&old).unwrap(), "content");
        assert!(Outputs::new().file("--out", &old.join("below")).is_err());
        assert!(Outputs::new().directory("--out", &old).is_err());
        assert!(Outputs::new().file("--out", scratch.path()).is_err());
    }
}
