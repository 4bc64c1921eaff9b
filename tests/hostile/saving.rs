//! S1 to S8: what saving leaves behind, whatever happens on the way.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use burn_peft::PeftError;
use burn_peft::format::{
    AdapterFile, CONFIG_FILE, LoadOptions, SaveOptions, WEIGHTS_FILE, WriteOptions,
};

use super::victim::Victim;
use super::{OVERWRITE, Scratch, adapter, names};

/// What tells a child what to do.
pub const ROLE: &str = "BURN_PEFT_HOSTILE_ROLE";

/// The arguments that make this program run one of its tests.
pub fn only(test: &str) -> [String; 4] {
    [test, "--exact", "--nocapture", "--test-threads=1"].map(str::to_owned)
}

/// Runs a test of this program again as a child in `role`, after the commands of a shell.
#[cfg(unix)]
fn child(shell: &str, test: &str, role: &str) -> Output {
    Command::new("sh")
        .arg("-c")
        .arg(format!("{shell}; exec \"$0\" \"$@\""))
        .arg(std::env::current_exe().unwrap())
        .args(only(test))
        .env(ROLE, role)
        .output()
        .unwrap()
}

/// The number of the whole adapter in `dir`; a mixture of two is none.
pub fn whole(dir: &Path) -> Result<f32, PeftError> {
    let found = AdapterFile::read(dir, &Default::default())?;
    let first = found.config.lora_alpha as f32;
    assert!(
        found.tensors == adapter(first).tensors,
        "a mixture: {found:?}"
    );
    Ok(first)
}

/// A full disk is shown by a limit on the size of files: permission bits stop nobody who is root.
// S1
#[cfg(unix)]
#[test]
fn a_limit_on_the_size_of_files_leaves_the_old_ones_and_no_scratch() {
    if let Ok(dir) = std::env::var(ROLE) {
        let error = adapter(0.75).write(Path::new(&dir), &OVERWRITE).err();
        println!(
            "outcome: {}",
            error.map_or("saved".into(), |error| error.to_string())
        );
        return;
    }
    let this = "saving::a_limit_on_the_size_of_files_leaves_the_old_ones_and_no_scratch";
    let mut outcomes = Vec::new();
    for fresh in [false, true] {
        for blocks in 0..8 {
            let scratch = Scratch::new();
            let dir = match fresh {
                false => scratch.path().to_owned(),
                true => scratch.file("new/dir"),
            };
            let before = [WEIGHTS_FILE, CONFIG_FILE].map(|file| scratch.bytes(file));
            let shell = format!("trap '' XFSZ; ulimit -f {blocks}");
            let output = child(&shell, this, dir.to_str().unwrap());
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success(), "{text}");
            let (_, outcome) = text.split_once("outcome: ").unwrap();
            let outcome = outcome.lines().next().unwrap();
            if outcome == "saved" {
                assert_eq!(whole(&dir).unwrap(), 0.75);
                assert_eq!(names(&dir), [CONFIG_FILE, WEIGHTS_FILE]);
            } else {
                let after = [WEIGHTS_FILE, CONFIG_FILE].map(|file| scratch.bytes(file));
                assert!(after == before, "{blocks}: {outcome}");
                assert_eq!(
                    names(scratch.path()),
                    [CONFIG_FILE, WEIGHTS_FILE],
                    "{outcome}"
                );
                assert!(outcome.contains("File too large"), "{outcome}");
            }
            outcomes.push(outcome.to_owned());
        }
    }
    println!("{outcomes:#?}");
    // The limits hit either file, and some let both through.
    for part in [WEIGHTS_FILE, CONFIG_FILE, "saved"] {
        assert!(
            outcomes
                .iter()
                .filter(|outcome| outcome.contains(part))
                .count()
                >= 2,
            "{part}"
        );
    }
}

/// A small file system in memory, where this process may mount one; elsewhere the limit above has shown the same.
// S5
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_old_files_and_no_scratch() {
    struct Mounted(tempfile::TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0.path()).status();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let options = ["-t", "tmpfs", "-o", "size=16k", "tmpfs"];
    let mounted = Command::new("mount").args(options).arg(dir.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        println!("nothing can be mounted here");
        return;
    }
    let mounted = Mounted(dir);
    let dir = mounted.0.path();
    let mut large = adapter(0.75);
    large.tensors[0] = super::module(super::MODULES[0], 2, [1 << 10, 6], 0.75);
    // Of four pages, two are taken by the old files; the new ones, of three and one, find no room.
    adapter(0.5).write(dir, &OVERWRITE).unwrap();
    let before = [WEIGHTS_FILE, CONFIG_FILE].map(|file| fs::read(dir.join(file)).unwrap());
    match large.write(dir, &OVERWRITE).unwrap_err() {
        PeftError::Io { path, source } => {
            assert!(path.starts_with(dir), "{}", path.display());
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{source}");
        }
        other => panic!("{other}"),
    }
    let after = [WEIGHTS_FILE, CONFIG_FILE].map(|file| fs::read(dir.join(file)).unwrap());
    assert!(after == before);
    assert_eq!(names(dir), [CONFIG_FILE, WEIGHTS_FILE]);
}

// S2
#[test]
fn what_may_be_no_adapter_is_not_replaced_unless_asked() {
    let keep = WriteOptions {
        keep_existing: true,
        ..Default::default()
    };
    for (there, occupied) in [
        (&[WEIGHTS_FILE, CONFIG_FILE][..], CONFIG_FILE),
        (&[WEIGHTS_FILE], WEIGHTS_FILE),
        (&[CONFIG_FILE], CONFIG_FILE),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for file in there {
            fs::write(dir.path().join(file), "somebody's").unwrap();
        }
        let options = WriteOptions::default();
        let error = adapter(0.75).write(dir.path(), &options).unwrap_err();
        assert!(
            matches!(&error, PeftError::Occupied { path, .. } if path.ends_with(occupied)),
            "{error}"
        );
        assert!(
            error.to_string().contains("`overwrite` replaces it"),
            "{error}"
        );
        let error = adapter(0.75).write(dir.path(), &keep).unwrap_err();
        assert!(
            matches!(&error, PeftError::Exists { path } if path.ends_with(there[0])),
            "{error}"
        );
        for file in there {
            assert_eq!(fs::read(dir.path().join(file)).unwrap(), b"somebody's");
        }
        assert_eq!(names(dir.path()).len(), there.len());
    }
}

/// A link that leads nowhere is not there for who looks, and is there for who takes its name: as a file is that appears
/// in between.
// S2
#[cfg(unix)]
#[test]
fn a_name_that_is_taken_at_the_last_moment_is_not_overwritten() {
    for file in [WEIGHTS_FILE, CONFIG_FILE] {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join(file);
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        let error = adapter(0.5)
            .write(dir.path(), &WriteOptions::default())
            .unwrap_err();
        assert!(
            matches!(&error, PeftError::Occupied { path, .. } if *path == link),
            "{error}"
        );
        let keep = WriteOptions {
            keep_existing: true,
            ..Default::default()
        };
        let error = adapter(0.5).write(dir.path(), &keep).unwrap_err();
        assert!(
            matches!(&error, PeftError::Exists { path } if *path == link),
            "{error}"
        );
        assert_eq!(names(dir.path()), [file]);
        assert!(link.is_symlink());
    }
}

// S2
#[cfg(unix)]
#[test]
fn a_link_in_a_file_s_place_is_replaced_and_not_followed() {
    let (dir, other) = (Scratch::new(), tempfile::tempdir().unwrap());
    for file in [WEIGHTS_FILE, CONFIG_FILE] {
        let target = other.path().join(file);
        fs::write(&target, "somebody's").unwrap();
        fs::remove_file(dir.file(file)).unwrap();
        std::os::unix::fs::symlink(&target, dir.file(file)).unwrap();
    }
    adapter(0.75).write(dir.path(), &OVERWRITE).unwrap();
    assert_eq!(whole(dir.path()).unwrap(), 0.75);
    for file in [WEIGHTS_FILE, CONFIG_FILE] {
        assert!(!dir.file(file).is_symlink());
        assert_eq!(fs::read(other.path().join(file)).unwrap(), b"somebody's");
    }
}

// S4
#[cfg(unix)]
#[test]
fn modes_follow_the_umask_and_those_of_replaced_files_stay() {
    use std::os::unix::fs::PermissionsExt;

    if let Ok(dir) = std::env::var(ROLE) {
        return adapter(0.75).write(Path::new(&dir), &OVERWRITE).unwrap();
    }
    let this = "saving::modes_follow_the_umask_and_those_of_replaced_files_stay";
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for umask in [0o000, 0o022, 0o027, 0o077] {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("new");
        let shell = format!("umask {umask:03o}");
        let save = || assert!(child(&shell, this, dir.to_str().unwrap()).status.success());
        save();
        assert_eq!(mode(&dir), 0o777 & !umask);
        for file in [WEIGHTS_FILE, CONFIG_FILE] {
            assert_eq!(mode(&dir.join(file)), 0o666 & !umask, "{umask:o}");
        }
        adapter(0.5).write(&dir, &OVERWRITE).unwrap();
        fs::set_permissions(dir.join(CONFIG_FILE), fs::Permissions::from_mode(0o604)).unwrap();
        save();
        assert_eq!(whole(&dir).unwrap(), 0.75);
        assert_eq!(mode(&dir.join(CONFIG_FILE)), 0o604);
        assert_eq!(mode(&dir.join(WEIGHTS_FILE)), 0o666 & !umask);
    }
}

// S5
#[test]
fn places_where_nothing_can_be_written_are_errors_that_name_the_path() {
    let scratch = Scratch::new();
    let before = names(scratch.path());
    let save = |dir: &Path| match adapter(0.75).write(dir, &OVERWRITE).unwrap_err() {
        PeftError::Io { path, source } => {
            assert!(
                path.starts_with(dir) || dir.starts_with(&path),
                "{}",
                path.display()
            );
            source
        }
        other => panic!("{other}"),
    };
    // A name, and a path, too long for any file system.
    save(&scratch.file(&"x".repeat(300)));
    save(&scratch.file(&"x/".repeat(4000)));
    // A file in the directory's place, and above it.
    save(&scratch.file(CONFIG_FILE));
    save(&scratch.file(CONFIG_FILE).join("dir"));
    // Nobody makes files here, not even root.
    #[cfg(target_os = "linux")]
    save("/proc/adapter".as_ref());
    #[cfg(target_os = "linux")]
    save("/proc".as_ref());
    assert_eq!(names(scratch.path()), before);
    assert_eq!(whole(scratch.path()).unwrap(), 0.5);
    // A directory in a file's place.
    for file in [WEIGHTS_FILE, CONFIG_FILE] {
        let scratch = Scratch::new();
        fs::remove_file(scratch.file(file)).unwrap();
        fs::create_dir(scratch.file(file)).unwrap();
        let error = adapter(0.75).write(scratch.path(), &OVERWRITE).unwrap_err();
        assert!(
            matches!(&error, PeftError::Malformed { path, .. } if *path == scratch.file(file)),
            "{error}"
        );
        assert_eq!(names(scratch.path()), before);
    }
}

// S6
#[test]
fn an_adapter_is_saved_over_the_files_it_was_loaded_from() {
    let options = |digest| SaveOptions {
        overwrite: true,
        digest,
        ..Default::default()
    };
    for digest in [false, true] {
        let scratch = Scratch::new();
        let mut model = Victim::new().model;
        let load = LoadOptions {
            replace: true,
            ..Default::default()
        };
        model
            .load_adapter("default", scratch.path(), &load)
            .unwrap();
        let mut bytes = None;
        for _ in 0..3 {
            let dir = model
                .save_adapter("default", scratch.path(), &options(digest))
                .unwrap();
            assert_eq!(dir, scratch.path());
            assert_eq!(whole(&dir).unwrap(), 0.5);
            let now = [WEIGHTS_FILE, CONFIG_FILE].map(|file| scratch.bytes(file));
            assert!(bytes.get_or_insert_with(|| now.clone()) == &now);
            model.load_adapter("default", &dir, &load).unwrap();
        }
        assert_eq!(names(scratch.path()), [CONFIG_FILE, WEIGHTS_FILE]);
    }
}

// S7
#[test]
fn the_same_adapter_gives_the_same_bytes() {
    for digest in [false, true] {
        let mut file = adapter(0.5);
        let first = Scratch::of(&file, digest);
        for _ in 0..8 {
            file.tensors.reverse();
            let again = Scratch::of(&file, digest);
            for name in [WEIGHTS_FILE, CONFIG_FILE] {
                assert!(again.bytes(name) == first.bytes(name), "{name}");
            }
        }
    }
}

// S8
#[test]
fn of_several_savers_at_once_one_wins_whole() {
    if let Ok(role) = std::env::var(ROLE) {
        let (first, dir) = role.split_once(':').unwrap();
        return save_often(Path::new(dir), first.parse().unwrap());
    }
    let this = "saving::of_several_savers_at_once_one_wins_whole";
    for processes in [false, true] {
        let scratch = Scratch::new();
        let dir = scratch.path();
        let savers = [1.0, 2.0, 3.0];
        let (mut read, mut refused) = (0, 0);
        std::thread::scope(|scope| {
            let savers = savers.map(|first| {
                scope.spawn(move || {
                    if !processes {
                        return save_often(dir, first);
                    }
                    let child = Command::new(std::env::current_exe().unwrap())
                        .args(only(this))
                        .env(ROLE, format!("{first}:{}", dir.display()))
                        .output();
                    assert!(child.unwrap().status.success());
                })
            });
            // Who reads meanwhile gets one whole adapter, or an error that says why there is none.
            while savers.iter().any(|saver| !saver.is_finished()) {
                match whole(dir) {
                    Ok(_) => read += 1,
                    Err(PeftError::Io { .. } | PeftError::Malformed { .. }) => refused += 1,
                    Err(other) => panic!("{other}"),
                }
            }
        });
        println!("processes {processes}: {read} read, {refused} refused");
        assert!(savers.contains(&whole(dir).unwrap()));
        assert_eq!(names(dir), [CONFIG_FILE, WEIGHTS_FILE]);
        assert!(read > 0);
    }
}

fn save_often(dir: &Path, first: f32) {
    for _ in 0..40 {
        adapter(first).write(dir, &OVERWRITE).unwrap();
    }
}
