//! Saving when the disk fails, or the process ends, at any step.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::atomic::{Content, Scratch, write_contents, write_files};
use super::disk::faults::{Fault, KILLED, set_no_links, under};
use super::disk::is_scratch;
use crate::PeftError;

type Files = Vec<(String, String)>;

/// The files in `dir` by name, or none where there is no directory.
fn content(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let mut files: Vec<_> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read_to_string(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn pair(weights: &str, config: &str) -> Files {
    [("c", config), ("w", weights)]
        .map(|(name, text)| (name.to_owned(), text.to_owned()))
        .into()
}

/// What is to be saved, the first file and the last.
const NEW: [(&str, &[u8]); 2] = [("w", b"the new tensors"), ("c", b"the new configuration")];

fn new() -> Files {
    pair("the new tensors", "the new configuration")
}

/// Files that a save of `NEW` may find.
fn situations() -> [Files; 5] {
    [
        Vec::new(),
        pair("the old tensors", "the old configuration"),
        // Of the same length as the new ones, so that contents are compared.
        pair("the odd tensors", "the new configuration"),
        pair("the new tensors", "the odd configuration"),
        vec![("w".into(), "tensors alone".into())],
    ]
}

fn put(dir: &Path, files: &Files) {
    if !files.is_empty() {
        fs::create_dir_all(dir).unwrap();
    }
    for (name, text) in files {
        fs::write(dir.join(name), text).unwrap();
    }
}

/// No last file beside others than those it was saved with.
fn assert_no_mixture(found: &Files, old: &Files, what: &str) {
    let named: Files = found
        .iter()
        .filter(|(name, _)| !is_scratch(name))
        .cloned()
        .collect();
    let has_config = named.iter().any(|(name, _)| name == "c");
    assert!(
        !has_config || named == *old || named == new(),
        "{what}: {found:?}"
    );
}

/// Runs `test` on a file system with hard links and on one without.
fn with_and_without_links(test: impl Fn()) {
    for none in [false, true] {
        set_no_links(none);
        test();
    }
    set_no_links(false);
}

#[test]
fn a_step_that_fails_leaves_everything_as_it_was() {
    with_and_without_links(each_step_fails);
}

fn each_step_fails() {
    for old in situations() {
        let (mut steps, mut done_without) = (0, 0);
        for n in 0.. {
            let scratch = tempfile::tempdir().unwrap();
            let dir = scratch.path().join("a/b");
            put(&dir, &old);
            let (result, done) = under(Some(Fault::At(n, n)), || write_files(&dir, &NEW, true));
            if done <= n {
                result.unwrap();
                assert_eq!(content(&dir), new());
                steps = done;
                break;
            }
            let error = match result {
                Err(error) => error,
                // A second name for the old file can be done without.
                Ok(()) => {
                    done_without += 1;
                    assert_eq!(content(&dir), new());
                    continue;
                }
            };
            assert!(matches!(error, PeftError::Io { .. }), "{n}: {error}");
            assert_eq!(content(&dir), old, "step {n}: {error}");
            assert_eq!(dir.exists(), !old.is_empty(), "step {n}");
        }
        println!("{} files: {steps} steps", old.len());
        assert!(steps >= 8 && done_without <= 1, "{steps}, {done_without}");
    }
}

/// Also where putting things back fails: what was there is then under a scratch name.
#[test]
fn two_failures_or_a_dead_disk_make_no_mixture_and_lose_nothing() {
    with_and_without_links(two_steps_fail);
}

fn two_steps_fail() {
    let mut cases = 0;
    for old in situations() {
        let mut run = |fault: Fault| {
            let scratch = tempfile::tempdir().unwrap();
            let dir = scratch.path().join("a/b");
            put(&dir, &old);
            let (result, _) = under(Some(fault), || write_files(&dir, &NEW, true));
            let found = content(&dir);
            cases += 1;
            match result {
                Ok(()) => assert_eq!(found, new(), "{fault:?}"),
                Err(_) => {
                    assert_no_mixture(&found, &old, &format!("{fault:?}"));
                    for (_, text) in &old {
                        let kept = found.iter().any(|(_, found)| found == text);
                        assert!(kept, "{fault:?}: {text:?} is lost: {found:?}");
                    }
                }
            }
        };
        // More than any save takes; what undoes it takes at most four, two removals and two moves, right behind.
        const STEPS: usize = 32;
        for n in 0..STEPS {
            run(Fault::From(n));
            for m in n + 1..=n + 4 {
                run(Fault::At(n, m));
            }
        }
    }
    println!("{cases} cases");
}

/// A model of several files in the place of which there is to be one of others, written in pieces.
#[test]
fn files_of_another_model_go_only_if_the_new_ones_come() {
    let files = |texts: &[(&str, &str)]| -> Files {
        let files = texts.iter();
        files
            .map(|(name, text)| ((*name).into(), (*text).into()))
            .collect()
    };
    let old = files(&[
        ("c", "old"),
        ("m-1", "one"),
        ("m-2", "two"),
        ("other", "mine"),
    ]);
    let expected = files(&[("c", "new"), ("other", "mine"), ("w", "in pieces")]);
    let save = |dir: &Path| {
        let write = |scratch: &mut Scratch| {
            scratch.write(b"in ")?;
            scratch.write(b"pieces")
        };
        let stream = Content::Stream(Box::new(write));
        let contents = vec![("w", stream), ("c", Content::Bytes(b"new"))];
        write_contents(dir, contents, Some(&|name| name.starts_with("m-")), true)
    };
    let run = |fault: Fault| {
        let scratch = tempfile::tempdir().unwrap();
        put(scratch.path(), &old);
        let (result, done) = under(Some(fault), || save(scratch.path()));
        (result, done, content(scratch.path()))
    };
    for n in 0.. {
        let (result, done, found) = run(Fault::At(n, n));
        match result {
            Err(_) => assert_eq!(found, old, "step {n}"),
            Ok(()) => {
                assert_eq!(found, expected);
                assert!(done <= n && n >= 16, "{done} {n}");
                break;
            }
        }
    }
    for n in 0..32 {
        let faults = (n + 1..=n + 6).map(|m| Fault::At(n, m));
        for fault in faults.chain([Fault::From(n)]) {
            let (result, _, found) = run(fault);
            let named = found.iter().filter(|(name, _)| !is_scratch(name));
            let named: Files = named.cloned().collect();
            if result.is_ok() {
                assert_eq!(found, expected, "{fault:?}");
                continue;
            }
            let has_config = named.iter().any(|(name, _)| name == "c");
            assert!(
                !has_config || named == old || named == expected,
                "{fault:?}: {found:?}"
            );
            for (_, text) in &old {
                assert!(found.iter().any(|(_, found)| found == text), "{fault:?}");
            }
        }
    }
}

/// The step at which a child is to end, whether it has no hard links, and the path of the directory.
const CHILD: &str = "BURN_PEFT_KILL_AT";

#[test]
fn a_process_that_ends_at_any_step_leaves_no_mixture() {
    if let Ok(child) = std::env::var(CHILD) {
        let (n, rest) = child.split_once(':').unwrap();
        let (no_links, dir) = rest.split_once(':').unwrap();
        set_no_links(no_links == "true");
        let kill = Fault::Kill(n.parse().unwrap());
        let (result, _) = under(Some(kill), || write_files(Path::new(dir), &NEW, true));
        return result.unwrap();
    }
    let this = "format::faulty::a_process_that_ends_at_any_step_leaves_no_mixture";
    let mut ends = 0;
    let ways = [false, true].into_iter();
    for (no_links, old) in ways.flat_map(|none| situations().map(|old| (none, old))) {
        for n in 0.. {
            let scratch = tempfile::tempdir().unwrap();
            let dir = scratch.path().join("a");
            put(&dir, &old);
            let child = Command::new(std::env::current_exe().unwrap())
                .args([this, "--exact"])
                .env(CHILD, format!("{n}:{no_links}:{}", dir.display()))
                .output()
                .unwrap();
            let found = content(&dir);
            if child.status.success() {
                assert_eq!(found, new());
                break;
            }
            assert_eq!(child.status.code(), Some(KILLED), "{child:?}");
            ends += 1;
            assert_no_mixture(&found, &old, &format!("step {n}"));
            for (_, text) in old.iter().filter(|_| found != new()) {
                let kept = found.iter().any(|(_, found)| found == text);
                assert!(kept, "step {n}: {text:?} is lost: {found:?}");
            }
            // The next saver tidies up, if it may overwrite; otherwise it keeps what may be the only copy.
            let files = [("other", &b"1"[..])];
            if dir.exists() {
                write_files(&dir, &files, false).unwrap();
                assert_eq!(content(&dir).len(), found.len() + 1);
            }
            write_files(&dir, &NEW, true).unwrap();
            let left = content(&dir);
            assert!(!left.iter().any(|(name, _)| is_scratch(name)), "{left:?}");
        }
    }
    println!("{ends} ends");
    assert!(ends >= 120, "{ends}");
}

/// Files of others that look much like ours stay.
#[test]
fn only_scratch_files_are_tidied_up() {
    let dir = tempfile::tempdir().unwrap();
    for name in [".burn-peft-notes.tmp", ".adapter-abcdef", ".tmpABCDEF"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    // A directory, and a link, of a scratch file's name.
    fs::create_dir(dir.path().join(".burn-peft-directry.tmp")).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("nowhere", dir.path().join(".burn-peft-linklink.tmp")).unwrap();
    let before = fs::read_dir(dir.path()).unwrap().count();
    fs::write(dir.path().join(".burn-peft-12345678.tmp"), "").unwrap();
    write_files(dir.path(), &NEW, true).unwrap();
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        before + NEW.len()
    );
}
