//! What stands in a file's place, where it is not what its name says: a pointer of Git LFS, an error page, a pickle.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::PeftError;

/// How many bytes are looked at.
const START: usize = 512;

/// The first bytes of the file at `path`, as far as they can be read.
pub(super) fn start_of(path: &Path) -> Vec<u8> {
    let mut start = Vec::with_capacity(START);
    if let Ok(file) = File::open(path) {
        // What cannot be read is not recognised.
        let _ = file.take(START as u64).read_to_end(&mut start);
    }
    start
}

/// An error that says what stands in the place of the file at `path`, if its first bytes are known; else `error`.
pub(super) fn recognised(path: &Path, start: &[u8], error: PeftError) -> PeftError {
    match recognise(start) {
        Some(reason) => PeftError::Malformed {
            path: path.to_owned(),
            reason,
        },
        None => error,
    }
}

/// `error`, of the file at `path` with this content, which should be JSON: with what stands in its place, if it is no JSON and
/// that is known.
pub(crate) fn not_json(path: &Path, content: &[u8], error: PeftError) -> PeftError {
    let is_json = !matches!(error, PeftError::Json { .. });
    let error = error.in_file(path);
    match is_json {
        true => error,
        false => recognised(path, &content[..content.len().min(START)], error),
    }
}

/// What a file is that begins so, and what to do. To be asked only about a file that is not what it should be.
pub(crate) fn recognise(start: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(start);
    let trimmed = text.trim_start().to_ascii_lowercase();
    let begins = |beginnings: &[&str]| {
        beginnings
            .iter()
            .any(|beginning| trimmed.starts_with(beginning))
    };
    if begins(&["version https://git-lfs", "version https://hawser"]) {
        let size = text.lines().find_map(|line| line.strip_prefix("size "));
        let size = size.and_then(|size| size.trim().parse::<u64>().ok());
        let size = size.map_or(String::new(), |size| format!(" for a file of {size} bytes"));
        return Some(format!(
            "a Git LFS pointer{size}, not the file itself: run `git lfs pull` in its repository"
        ));
    }
    if begins(&["# xet version"]) {
        return Some(
            "a Xet pointer, not the file itself: download it with `hf download`".to_owned(),
        );
    }
    if begins(&["<!doctype html", "<html", "<head"]) {
        return Some(
            "an HTML page, as a server sends it in place of a file that needs a login or is not there: download it again"
                .to_owned(),
        );
    }
    if begins(&["<?xml", "<error"]) {
        return Some(
            "an XML text, as a server sends it in place of a file that needs a login or is not there: download it again"
                .to_owned(),
        );
    }
    const ARCHIVES: [(&[u8], &str); 8] = [
        (
            b"PK\x03\x04",
            "a zip archive, as `torch.save` writes it: `safetensors.torch.save_file(torch.load(PATH, weights_only=True), OUT)` in Python converts it",
        ),
        (
            b"GGUF",
            "a GGUF file of llama.cpp: take the safetensors files that it was made from",
        ),
        (
            b"\x89HDF",
            "an HDF5 file, as Keras writes it: `AutoModel.from_pretrained(DIR, from_tf=True).save_pretrained(OUT)` of transformers 4 converts it",
        ),
        (b"\x93NUMPY", "an array of NumPy"),
        (b"\x1f\x8b", "compressed by gzip: unpack it"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
        (b"\xff\xfe", "a text in UTF-16: save it in UTF-8"),
        (b"\xfe\xff", "a text in UTF-16: save it in UTF-8"),
    ];
    if let Some((_, what)) = ARCHIVES.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some((*what).to_owned());
    }
    if let [0x80, 2..=5, ..] = start {
        return Some(
            "a pickle, which is never read: `safetensors.torch.save_file(torch.load(PATH, weights_only=True), OUT)` in Python converts it"
                .to_owned(),
        );
    }
    if start.starts_with(b"\xef\xbb\xbf") {
        return Some(
            "it begins with a byte-order mark, which Python refuses too: save it in UTF-8 without one"
                .to_owned(),
        );
    }
    if start.len() >= 16 && start.iter().all(|byte| *byte == 0) {
        return Some("it begins with zeros: a download that did not finish".to_owned());
    }
    // The answers of servers to a wrong address or token.
    const ANSWERS: [&str; 6] = [
        "entry not found",
        "not found",
        "invalid username or password",
        "access to model",
        "repository not found",
        "unauthorized",
    ];
    if begins(&ANSWERS) {
        let line: String = text.lines().next().unwrap_or("").chars().take(80).collect();
        return Some(format!(
            "a server's answer in place of the file, `{}`: download it again",
            line.escape_debug()
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_a_file_s_place_is_told_with_what_to_do() {
        let pointer =
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n";
        for (start, what) in [
            (
                pointer.as_bytes(),
                "Git LFS pointer for a file of 548118077 bytes",
            ),
            (pointer.as_bytes(), "git lfs pull"),
            (b"# xet version 0\n", "Xet pointer"),
            (b"\n<!DOCTYPE html><html>", "an HTML page"),
            (b"<?xml version=\"1.0\"?><Error>", "an XML text"),
            (b"PK\x03\x04\x00\x00\x08\x08", "torch.save"),
            (b"\x80\x02}q\x00", "a pickle"),
            (b"GGUF\x03\x00\x00\x00", "llama.cpp"),
            (b"\xef\xbb\xbf{}", "byte-order mark"),
            (b"\xff\xfe{\x00", "UTF-16"),
            (&[0; 512], "zeros"),
            (b"Entry not found", "`Entry not found`"),
        ] {
            let found = recognise(start).unwrap();
            assert!(found.contains(what), "{found}");
        }
        for start in [
            &b""[..],
            b"{}",
            b"\x02\0\0\0\0\0\0\0{}",
            b"\x80\x01",
            b"xyz",
        ] {
            assert_eq!(recognise(start), None);
        }
    }
}
