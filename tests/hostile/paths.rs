//! H11 and H12: pickles, names that are paths, and what is no file in a file's place.

use std::fs;
use std::path::Path;

use burn_peft::PeftError;
use burn_peft::format::{CONFIG_FILE, LoadOptions, SaveOptions, WEIGHTS_FILE, adapter_dir};

use super::victim::Victim;
use super::{Scratch, names};

// H11
#[test]
fn a_pickle_is_refused_and_not_opened() {
    let scratch = Scratch::new();
    fs::remove_file(scratch.file(WEIGHTS_FILE)).unwrap();
    let pickle = scratch.file("adapter_model.bin");
    // To open it would fail otherwise.
    fs::create_dir(&pickle).unwrap();
    match scratch.refused() {
        PeftError::Malformed { path, reason } => {
            assert_eq!(path, pickle);
            assert!(reason.contains("a pickle, which is never read"), "{reason}");
        }
        other => panic!("{other}"),
    }
    // Beside a file of tensors it is nobody's business.
    let scratch = Scratch::new();
    fs::write(scratch.file("adapter_model.bin"), "cos\nsystem\n").unwrap();
    assert!(scratch.read().is_ok());
}

// H11
#[test]
fn a_pickle_or_an_archive_by_another_name_is_refused() {
    for (bytes, told) in [
        (&b"cos\nsystem\n(S'true'\ntR."[..], "a header of"),
        (b"\x80\x02}q\x00.", "a pickle, which is never read"),
        // torch.save's zip.
        (
            b"PK\x03\x04\x14\x00\x00\x00\x08\x00archive/data.pkl",
            "a zip archive",
        ),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "gzip"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    ] {
        let scratch = Scratch::new();
        let reason = scratch.weights(bytes).malformed(WEIGHTS_FILE);
        assert!(reason.contains(told), "{reason}");
    }
}

// H11
#[test]
fn a_directory_without_files_is_refused() {
    let scratch = Scratch::new();
    fs::remove_file(scratch.file(WEIGHTS_FILE)).unwrap();
    let error = scratch.refused();
    assert!(
        matches!(&error, PeftError::Io { path, .. } if *path == scratch.file(WEIGHTS_FILE)),
        "{error}"
    );
    let error = Victim::new().refuses(&scratch.file("none"));
    assert!(
        matches!(&error, PeftError::Malformed { path, reason } if path.ends_with("none") && reason.contains("not there")),
        "{error}"
    );
    // A file in the directory's place.
    let error = Victim::new().refuses(&scratch.file(CONFIG_FILE));
    assert!(
        matches!(&error, PeftError::Malformed { path, reason } if path.ends_with(CONFIG_FILE) && reason.contains("the directory that holds")),
        "{error}"
    );
}

/// Names that lead elsewhere, break PEFT's keys, or would be obeyed by a terminal.
const NAMES: [&str; 15] = [
    "",
    ".",
    "..",
    "../x",
    "../../etc/cron.d/x",
    "/etc/x",
    "/",
    "a/b",
    "a\\b",
    "C:x",
    "a\0b",
    "a\nb",
    "a\u{1b}b",
    "v1.0",
    "\u{202e}x.",
];

// H12
#[test]
fn names_that_are_paths_are_refused_on_loading_and_saving() {
    let scratch = Scratch::new();
    let out = scratch.file("out");
    for name in NAMES {
        let error = Victim::new().fails(4096, |model| {
            model.load_adapter(name, scratch.path(), &LoadOptions::default())
        });
        assert!(
            matches!(error, PeftError::AdapterName { .. }),
            "{name:?}: {error}"
        );
        let error = Victim::new().fails(4096, |model| {
            model.save_adapter(name, &out, &SaveOptions::default())
        });
        assert!(
            matches!(error, PeftError::AdapterName { .. }),
            "{name:?}: {error}"
        );
        assert!(matches!(
            adapter_dir(&out, name),
            Err(PeftError::AdapterName { .. })
        ));
    }
    let long = "x".repeat(256);
    let error = Victim::new().fails(4096, |model| {
        model.load_adapter(&long, scratch.path(), &LoadOptions::default())
    });
    assert!(matches!(error, PeftError::AdapterName { .. }), "{error}");
    assert_eq!(names(scratch.path()), [CONFIG_FILE, WEIGHTS_FILE]);
}

/// Replaces one of the two files by something else and gives back the reason of the refusal.
#[cfg(unix)]
fn replaced(file: &str, by: impl FnOnce(&Path)) -> PeftError {
    let scratch = Scratch::new();
    fs::remove_file(scratch.file(file)).unwrap();
    by(&scratch.file(file));
    let error = scratch.refused();
    assert!(error.to_string().contains(file), "{error}");
    error
}

// H12
#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_without_waiting_for_it() {
    use std::os::unix::fs::symlink;

    let pipe = |path: &Path| {
        let made = std::process::Command::new("mkfifo").arg(path).status();
        assert!(made.unwrap().success());
    };
    for file in [CONFIG_FILE, WEIGHTS_FILE] {
        let made = tempfile::tempdir().unwrap();
        let elsewhere = made.path().join("pipe");
        pipe(&elsewhere);
        let socket = |path: &Path| drop(std::os::unix::net::UnixListener::bind(path).unwrap());
        for error in [
            replaced(file, pipe),
            replaced(file, |path| symlink(&elsewhere, path).unwrap()),
            replaced(file, |path| symlink("/dev/zero", path).unwrap()),
            replaced(file, |path| symlink("/dev/stdin", path).unwrap()),
            replaced(file, socket),
            replaced(file, |path| fs::create_dir(path).unwrap()),
        ] {
            let PeftError::Malformed { reason, .. } = &error else {
                panic!("{error}")
            };
            // Whatever the standard input of this process is.
            assert!(
                reason == "not a regular file" || reason.contains("few") || reason.contains("JSON"),
                "{reason}"
            );
        }
        // Links that lead nowhere, and in a circle.
        for error in [
            replaced(file, |path| symlink("nowhere", path).unwrap()),
            replaced(file, |path| {
                symlink(path.file_name().unwrap(), path).unwrap()
            }),
        ] {
            assert!(matches!(error, PeftError::Io { .. }), "{error}");
        }
    }
}

/// A link to a file is that file: those of a cache of models are.
// H12
#[cfg(unix)]
#[test]
fn links_to_files_are_followed_on_loading() {
    let (there, here) = (Scratch::new(), tempfile::tempdir().unwrap());
    for file in [CONFIG_FILE, WEIGHTS_FILE] {
        std::os::unix::fs::symlink(there.file(file), here.path().join(file)).unwrap();
    }
    assert!(Victim::new().load(here.path()).is_ok());
}
