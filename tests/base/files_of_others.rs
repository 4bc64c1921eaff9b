//! What is not a checkpoint at all, though its name says so: each is told with what to do.

use burn_peft::PeftError;
use burn_peft::format::{BASE_FILE, BASE_INDEX_FILE, BaseOptions, Dtype, Family};

use crate::base::files::{Dir, serialize, tensor};

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707\nsize 548105171\n";

fn opened(dir: &Dir, file: &str) -> String {
    match dir.open().unwrap_err() {
        PeftError::Malformed { path, reason } => {
            assert_eq!(path, dir.file(file));
            reason
        }
        other => panic!("{other}"),
    }
}

#[test]
fn what_is_no_safetensors_file_is_told_with_what_to_do() {
    for (content, told) in [
        (
            POINTER.as_bytes(),
            "a Git LFS pointer for a file of 548105171 bytes",
        ),
        (POINTER.as_bytes(), "run `git lfs pull`"),
        (
            b"<!DOCTYPE html>\n<html><body>404</body></html>",
            "an HTML page",
        ),
        (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "an XML text",
        ),
        (b"Entry not found", "`Entry not found`: download it again"),
        (
            b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl",
            "torch.save",
        ),
        (
            b"\x80\x02\x8a\x0alFC\x9cF\xf9 j\xa8P\x19.",
            "a pickle, which is never read",
        ),
        (
            b"GGUF\x03\x00\x00\x00\x23\x01\x00\x00\x00\x00\x00\x00",
            "llama.cpp",
        ),
        (&[0; 4096], "a download that did not finish"),
    ] {
        for file in [BASE_FILE, "model-00001-of-00001.safetensors"] {
            let dir = Dir::new();
            if file != BASE_FILE {
                dir.sharded(&[(file, vec![tensor("a", Dtype::F32, &[2])])]);
            }
            dir.write(file, content);
            let reason = opened(&dir, file);
            assert!(reason.contains(told), "{reason}");
        }
    }
}

#[test]
fn what_is_no_index_or_configuration_is_told_too() {
    let dir = Dir::new();
    for (content, told) in [
        (POINTER.as_bytes(), "a Git LFS pointer"),
        (b"<html></html>", "an HTML page"),
        (b"\xef\xbb\xbf{\"weight_map\": {}}", "byte-order mark"),
        (b"\xff\xfe{\x00", "UTF-16"),
    ] {
        dir.write(BASE_INDEX_FILE, content);
        let reason = opened(&dir, BASE_INDEX_FILE);
        assert!(reason.contains(told), "{reason}");
    }
    // A configuration that is to say what is tied.
    let dir = Dir::new();
    dir.tensors(BASE_FILE, &[tensor("a", Dtype::F32, &[2])]);
    dir.write("config.json", POINTER);
    let options: BaseOptions = Family::llama().load_options();
    let error = dir
        .open()
        .unwrap()
        .load_into(&mut Vec::<burn::nn::Linear>::new(), &options);
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("config.json") && error.contains("git lfs pull"),
        "{error}"
    );
}

#[test]
fn a_download_that_did_not_finish_says_how_much_is_missing() {
    let dir = Dir::new();
    let whole = serialize(&[tensor("a", Dtype::F32, &[100])]);
    dir.write(BASE_FILE, &whole[..whole.len() - 33]);
    let reason = opened(&dir, BASE_FILE);
    let expected = "the header describes 400 bytes of values, the file has 367: 33 missing, as after a download that did not finish";
    assert_eq!(reason, expected);
    dir.write(BASE_FILE, [&whole[..], &[0; 5]].concat());
    assert!(opened(&dir, BASE_FILE).ends_with("5 too many"));
    dir.write(BASE_FILE, &whole[..20]);
    let reason = opened(&dir, BASE_FILE);
    assert!(reason.contains("was cut, as by a download"), "{reason}");
}

#[test]
fn files_of_other_names_are_named() {
    let dir = Dir::new();
    dir.tensors("consolidated.safetensors", &[tensor("a", Dtype::F32, &[2])]);
    let reason = opened(&dir, "");
    assert!(
        reason.contains(r#"there is ["consolidated.safetensors"], which can be given by its path"#),
        "{reason}"
    );
    let path = dir.file("consolidated.safetensors");
    assert_eq!(
        burn_peft::format::BaseCheckpoint::open(path).unwrap().len(),
        1
    );
}

#[test]
fn metadata_of_null_is_read() {
    let dir = Dir::new();
    let header = r#"{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let length = (header.len() as u64).to_le_bytes();
    dir.write(
        BASE_FILE,
        [&length[..], header.as_bytes(), &[0; 4]].concat(),
    );
    assert_eq!(dir.open().unwrap().len(), 1);
}
