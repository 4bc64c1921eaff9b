//! S3: processes that are killed while they save, at moments that nobody chose.
//!
//! `src/format/faulty.rs` ends a process at each step of saving in turn; here it is the system that ends it, wherever it
//! happens to be.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use burn_peft::PeftError;
use burn_peft::format::{CONFIG_FILE, WEIGHTS_FILE, WriteOptions};

use super::saving::{ROLE, only, whole};
use super::victim::Victim;
use super::{OVERWRITE, adapter, long, names};

const KILLS: usize = 240;
/// No more rounds after this, however many kills there were: then the machine is too slow to tell anything.
const TIME: Duration = Duration::from_secs(40);

// S3
#[test]
fn savers_that_are_killed_leave_one_whole_adapter_or_none() {
    if let Ok(role) = std::env::var(ROLE) {
        let (digest, dir) = role.split_once(':').unwrap();
        let options = WriteOptions {
            overwrite: true,
            digest: digest == "true",
            ..Default::default()
        };
        println!("\nsaving");
        loop {
            for first in [1.0, 2.0] {
                adapter(first).write(Path::new(dir), &options).unwrap();
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    adapter(1.0).write(dir, &OVERWRITE).unwrap();
    let start = Instant::now();
    let kills = if long() { 20 * KILLS } else { KILLS };
    let (mut killed, mut left) = (0, [0; 3]);
    while killed < kills && (long() || start.elapsed() < TIME) {
        // Now one saver, now two that take turns; with a digest or without.
        let savers = 1 + killed / 2 % 2;
        let digest = killed / 4 % 2 == 0;
        let children: Vec<_> = (0..savers).map(|_| spawn(dir, digest)).collect();
        for mut child in children {
            // From at once to after some savings, evenly spread.
            std::thread::sleep(Duration::from_micros((killed * 7919 % 9973) as u64));
            child.kill().unwrap();
            let status = child.wait().unwrap();
            assert_eq!(status.code(), None, "it ended by itself");
            killed += 1;
        }
        match whole(dir) {
            Ok(1.0) => left[0] += 1,
            Ok(2.0) => left[1] += 1,
            Ok(other) => panic!("nobody saved {other}"),
            // Between taking the old files away and placing the new ones.
            Err(PeftError::Io { path, source }) => {
                assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
                assert!(path.ends_with(CONFIG_FILE), "{}", path.display());
                left[2] += 1;
                Victim::new().refuses(dir);
            }
            Err(other) => panic!("{other}"),
        }
        // Whatever was left, the next saver tidies up.
        if killed % 16 < 2 {
            adapter(1.0).write(dir, &OVERWRITE).unwrap();
            assert_eq!(names(dir), [CONFIG_FILE, WEIGHTS_FILE]);
        }
    }
    let [one, two, none] = left;
    println!(
        "{killed} kills in {:?}: the first adapter {one} times, the second {two} times, none {none} times",
        start.elapsed()
    );
    assert!(killed >= 200, "{killed}");
    assert!(one > 0 && two > 0, "{one}, {two}");
}

/// A saver that has begun.
fn spawn(dir: &Path, digest: bool) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(only(
            "kill::savers_that_are_killed_leave_one_whole_adapter_or_none",
        ))
        .env(ROLE, format!("{digest}:{}", dir.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begun = lines.map_while(Result::ok).any(|line| line == "saving");
    assert!(begun, "no saver");
    child
}
