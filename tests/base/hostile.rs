//! Files and indices that are broken or lie: each its own error, which names the file and the tensor.

use std::fs;

use burn_peft::PeftError;
use burn_peft::format::{
    BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, Dtype, IndexFault, MAX_INDEX_BYTES,
    MAX_INDEX_TENSORS, MAX_SHARDS,
};
use serde_json::{Value, json};

use crate::base::files::{Dir, Tensor, content, tensor};

const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

fn a() -> Tensor {
    tensor("a", Dtype::BF16, &[3, 5])
}

fn b() -> Tensor {
    tensor("b", Dtype::F32, &[4])
}

fn c() -> Tensor {
    tensor("c", Dtype::U8, &[2, 2])
}

/// `a` and `b` in one file, `c` in the other.
fn sharded() -> (Dir, Value) {
    let dir = Dir::new();
    let index = dir.sharded(&[(ONE, vec![a(), b()]), (TWO, vec![c()])]);
    (dir, index)
}

fn faults(dir: &Dir) -> Vec<IndexFault> {
    match dir.open().unwrap_err() {
        PeftError::Index { path, faults } => {
            assert_eq!(path, dir.file(BASE_INDEX_FILE));
            faults
        }
        other => panic!("{other}"),
    }
}

fn malformed(dir: &Dir, file: &str) -> String {
    match dir.open().unwrap_err() {
        PeftError::Malformed { path, reason } => {
            assert_eq!(path, dir.file(file));
            reason
        }
        other => panic!("{other}"),
    }
}

#[test]
fn one_file_and_several_are_read_the_same() {
    let single = Dir::new();
    single.tensors(BASE_FILE, &[a(), b(), c()]);
    let (sharded, _) = sharded();
    let expected = content(&single.open().unwrap());
    let opened = sharded.open().unwrap();
    assert_eq!(content(&opened), expected);
    assert_eq!(opened.num_bytes(), 30 + 16 + 4);
    assert_eq!(opened.tensor("c").unwrap().file, sharded.file(TWO));
    assert!(opened.files().eq([sharded.file(ONE), sharded.file(TWO)]));
    for path in [single.file(BASE_FILE), sharded.file(BASE_INDEX_FILE)] {
        assert_eq!(content(&BaseCheckpoint::open(path).unwrap()), expected);
    }
    // Parts of tensors are parts of their bytes.
    for (name, (_, _, bytes)) in &expected {
        for offset in 0..=bytes.len() {
            let mut part = vec![0; (bytes.len() - offset).min(5)];
            opened.read_at(name, offset, &mut part).unwrap();
            assert_eq!(part, bytes[offset..offset + part.len()]);
        }
    }
}

#[test]
fn of_a_file_and_an_index_the_file_is_the_model() {
    let (dir, _) = sharded();
    dir.tensors(BASE_FILE, &[a()]);
    assert_eq!(dir.open().unwrap().len(), 1);
    // Not read at all: it may be broken.
    dir.write(BASE_INDEX_FILE, "{");
    assert_eq!(dir.open().unwrap().len(), 1);
}

#[test]
fn a_directory_without_a_model_is_refused_and_a_pickle_named() {
    let dir = Dir::new();
    let reason = malformed(&dir, "");
    assert!(reason.contains("neither model.safetensors nor"), "{reason}");
    dir.write("pytorch_model.bin", "cos\nsystem\n");
    let reason = malformed(&dir, "");
    assert!(reason.contains("pytorch_model.bin is a pickle"), "{reason}");
    let error = BaseCheckpoint::open(dir.file("none")).unwrap_err();
    assert!(matches!(error, PeftError::Io { path, .. } if path == dir.file("none")));
    // What is not a file is not waited for.
    fs::create_dir(dir.file(BASE_FILE)).unwrap();
    assert!(malformed(&dir, BASE_FILE).contains("not a regular file"));
}

#[test]
fn a_cut_file_is_refused_at_every_length() {
    let (dir, _) = sharded();
    let whole = fs::read(dir.file(ONE)).unwrap();
    for length in 0..whole.len() {
        dir.write(ONE, &whole[..length]);
        let reason = malformed(&dir, ONE);
        assert!(
            reason.contains("header") || reason.contains("too few"),
            "{reason}"
        );
    }
    dir.write(ONE, [&whole[..], &[0]].concat());
    assert!(malformed(&dir, ONE).contains("the file has 47"));
}

#[test]
fn a_file_cut_after_it_was_opened_is_an_error_of_the_read() {
    let (dir, _) = sharded();
    let checkpoint = dir.open().unwrap();
    let file = fs::File::options().write(true).open(dir.file(ONE)).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    // The tensors lie as the crate puts them: wider types first.
    assert_eq!(checkpoint.read("b").unwrap(), b().bytes);
    for error in [
        checkpoint.read("a").unwrap_err(),
        checkpoint.read_at("a", 29, &mut [0]).unwrap_err(),
    ] {
        let PeftError::Malformed { path, reason } = error else {
            panic!("{error}");
        };
        assert_eq!(path, dir.file(ONE));
        assert!(
            reason.contains("tensor `a`: the file ends before"),
            "{reason}"
        );
    }
    assert_eq!(checkpoint.read("c").unwrap(), c().bytes);
}

#[test]
fn reads_beyond_a_tensor_are_refused() {
    let (dir, _) = sharded();
    let checkpoint = dir.open().unwrap();
    for (offset, length) in [(29, 2), (30, 1), (31, 0), (usize::MAX, 1)] {
        let error = checkpoint.read_at("a", offset, &mut vec![0; length]);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("asked for at its byte") && error.contains("tensor `a`"),
            "{error}"
        );
    }
    let error = checkpoint.read("d\n").unwrap_err().to_string();
    assert!(error.contains(r"there is no tensor `d\n`"), "{error}");
}

#[test]
fn shards_that_are_not_there_are_all_named() {
    let (dir, _) = sharded();
    for file in [ONE, TWO] {
        fs::remove_file(dir.file(file)).unwrap();
    }
    let missing = [ONE, TWO].map(|file| IndexFault::MissingShard { file: file.into() });
    assert_eq!(faults(&dir), missing);
}

#[test]
fn an_index_is_held_to_what_it_says() {
    let (dir, index) = sharded();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut index = index.clone();
        change(&mut index);
        dir.index(&index);
        faults(&dir)
    };
    let text = str::to_owned;
    // A tensor that no file has, and one where another file has it.
    assert_eq!(
        with(&|index| index["weight_map"]["d"] = json!(TWO)),
        [IndexFault::MissingTensor {
            tensor: text("d"),
            file: text(TWO)
        }]
    );
    assert_eq!(
        with(&|index| index["weight_map"]["a"] = json!(TWO)),
        [IndexFault::Misplaced {
            tensor: text("a"),
            expected: text(TWO),
            found: text(ONE)
        }]
    );
    // A tensor that the index keeps quiet about.
    assert_eq!(
        with(&|index| {
            index["weight_map"].as_object_mut().unwrap().remove("b");
        }),
        [IndexFault::Unlisted {
            tensor: text("b"),
            file: text(ONE)
        }]
    );
    // All of it in one error.
    let all = with(&|index| {
        index["weight_map"] = json!({"a": TWO, "c": TWO, "x": ONE, "y": ONE});
    });
    assert_eq!(all.len(), 4, "{all:?}");
    for stated in [json!(49), json!(51), json!(0), json!(-50), json!("50")] {
        assert_eq!(
            with(&|index| index["metadata"]["total_size"] = stated.clone()),
            [IndexFault::TotalSize {
                stated: stated.to_string(),
                found: 50
            }]
        );
    }
    // It need not be there.
    for metadata in [json!({}), json!({"format": "pt"})] {
        dir.index(&json!({"metadata": metadata, "weight_map": index["weight_map"]}));
        assert_eq!(dir.open().unwrap().len(), 3);
    }
    dir.index(&json!({"weight_map": index["weight_map"]}));
    assert_eq!(dir.open().unwrap().len(), 3);
}

#[test]
fn a_tensor_in_two_files_is_refused_wherever_the_index_places_it() {
    for place in [ONE, TWO] {
        let (dir, mut index) = sharded();
        // The same bytes: a loader that compared them might let it pass.
        dir.tensors(TWO, &[c(), a()]);
        index["weight_map"]["a"] = json!(place);
        dir.index(&index);
        let files = [ONE.to_owned(), TWO.to_owned()];
        let tensor = "a".to_owned();
        assert_eq!(faults(&dir), [IndexFault::Duplicate { tensor, files }]);
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused_and_nothing_is_opened() {
    let outside = Dir::new();
    outside.tensors("model.safetensors", &[a()]);
    let absolute = outside.file("model.safetensors");
    for file in [
        absolute.to_str().unwrap(),
        "../model.safetensors",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "model\u{0}.safetensors",
        "pytorch_model-00001-of-00002.bin",
    ] {
        let dir = Dir::new();
        dir.index(&json!({"weight_map": {"a": file}}));
        let (tensor, file) = ("a".to_owned(), file.to_owned());
        assert_eq!(faults(&dir), [IndexFault::NotAFileName { tensor, file }]);
    }
}

#[test]
fn what_is_no_index_is_refused() {
    let (dir, index) = sharded();
    for (text, expected) in [
        ("{}", "no object `weight_map`"),
        (r#"{"weight_map": []}"#, "no object `weight_map`"),
        (r#"{"weight_map": {}}"#, "lists no tensor"),
        (r#"{"weight_map": {"a": 3}}"#, "the file of `a`"),
        (
            r#"{"weight_map": {"a": ["x.safetensors"]}}"#,
            "the file of `a`",
        ),
        (r#"{"metadata": 3, "weight_map": {"a": "x"}}"#, "`metadata`"),
    ] {
        let reason = malformed(dir.write(BASE_INDEX_FILE, text), BASE_INDEX_FILE);
        assert!(reason.contains(expected), "{reason}");
    }
    let text = index.to_string();
    let twice = text.replacen(r#""a":"#, r#""\u0061":"x.safetensors","a":"#, 1);
    assert_ne!(twice, text);
    for text in ["", "[]", "{", "{} {}", "\u{80}", &twice] {
        let error = dir.write(BASE_INDEX_FILE, text).open().unwrap_err();
        let PeftError::InFile { path, source } = &error else {
            panic!("{error}");
        };
        assert_eq!(*path, dir.file(BASE_INDEX_FILE));
        assert!(matches!(**source, PeftError::Json { .. }), "{error}");
    }
    dir.write(BASE_INDEX_FILE, twice);
    let error = dir.open().unwrap_err().to_string();
    assert!(error.contains("the key `a` stands twice"), "{error}");
}

#[test]
fn indices_are_bounded() {
    let (dir, _) = sharded();
    let file = fs::File::create(dir.file(BASE_INDEX_FILE)).unwrap();
    // Sparse: nothing of it is read.
    file.set_len(MAX_INDEX_BYTES + 1).unwrap();
    assert!(malformed(&dir, BASE_INDEX_FILE).contains("at most 134217728 are read"));

    let many = |n: usize, file: &dyn Fn(usize) -> String| {
        let entries: Vec<_> = (0..n).map(|i| format!(r#""{i}":"{}""#, file(i))).collect();
        dir.write(
            BASE_INDEX_FILE,
            format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(",")),
        );
    };
    many(MAX_INDEX_TENSORS + 1, &|_| "x.safetensors".into());
    assert!(malformed(&dir, BASE_INDEX_FILE).contains("at most 1000000 are read"));
    many(MAX_INDEX_TENSORS + 2000, &|_| "x.safetensors".into());
    let error = dir.open().unwrap_err().to_string();
    assert!(error.contains("more than 1001024 values"), "{error}");
    many(MAX_SHARDS + 1, &|i| format!("{i}.safetensors"));
    assert!(malformed(&dir, BASE_INDEX_FILE).contains("513 files: at most 512"));
}

/// One file under many names has no more names of tensors than one, and as many headers as names.
#[test]
fn tensors_that_stand_twice_are_bounded_too() {
    let dir = Dir::new();
    let empty = |i: usize| tensor(&format!("t{i}"), Dtype::F32, &[0]);
    let many: Vec<Tensor> = (0..150_000).map(empty).collect();
    dir.tensors("0.safetensors", &many);
    let names: Vec<String> = (0..8).map(|i| format!("{i}.safetensors")).collect();
    for name in &names[1..] {
        fs::hard_link(dir.file("0.safetensors"), dir.file(name)).unwrap();
    }
    let entries = names
        .iter()
        .enumerate()
        .map(|(i, name)| format!(r#""t{i}":"{name}""#));
    let entries: Vec<_> = entries.collect();
    let index = format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(","));
    dir.write(BASE_INDEX_FILE, index);
    assert!(malformed(&dir, BASE_INDEX_FILE).contains("more than 1000000 tensors"));
}

/// Whatever is done to the bytes of an index, opening never panics, and what opens is what the files hold.
#[test]
fn a_mutated_index_is_refused_or_true() {
    let (dir, index) = sharded();
    let expected = content(&dir.open().unwrap());
    let text = index.to_string().into_bytes();
    let (mut opened, mut refused) = (0, 0);
    let mut check = |bytes: &[u8]| match dir.write(BASE_INDEX_FILE, bytes).open() {
        Ok(checkpoint) => {
            assert_eq!(content(&checkpoint), expected);
            opened += 1;
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!text.contains(char::is_control), "{text:?}");
            refused += 1;
        }
    };
    for at in 0..text.len() {
        let mut bytes = text.clone();
        for byte in [b'"', b'\\', b'/', b'.', b'0', b'{', 0, 0x1b, 0xff] {
            bytes[at] = byte;
            check(&bytes);
        }
        bytes[at] = text[at] ^ 1;
        check(&bytes);
        // One byte less, and one twice.
        check(&[&text[..at], &text[at + 1..]].concat());
        check(&[&text[..=at], &text[at..]].concat());
        check(&text[..at]);
    }
    // Changes in the keys of the metadata change nothing; all others do.
    assert!(opened > 100 && refused > 1000, "{opened} {refused}");
}
