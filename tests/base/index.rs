//! An index that is not true of its files: refused by default, and loaded as transformers loads it where that is allowed.
//!
//! `tests/golden/families/generate.py` asserts that transformers computes the same logits under each of these indices but the
//! two that it refuses too.

use burn_peft::PeftError;
use burn_peft::format::{
    BASE_INDEX_FILE, BaseCheckpoint, BaseOptions, Dtype, FileLimits, IndexFault, IndexFaultKind,
};
use serde_json::{Value, json};

use crate::base::files::{Dir, content, tensor};

const FIRST: &str = "model-00001-of-00003.safetensors";

/// The files of the tied Llama and its index.
fn sharded() -> (Dir, Value) {
    let (dir, source) = (Dir::new(), crate::golden("families/sharded"));
    for entry in std::fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.file(path.file_name().unwrap().to_str().unwrap())).unwrap();
    }
    let index = std::fs::read(source.join(BASE_INDEX_FILE)).unwrap();
    (dir, serde_json::from_slice(&index).unwrap())
}

fn faults(error: PeftError) -> Vec<IndexFault> {
    match error {
        PeftError::Index { faults, .. } => faults,
        other => panic!("{other}"),
    }
}

/// Makes an index wrong.
type Change = fn(&mut Value);

/// What can be wrong with an index, and the kind of fault that allows it.
fn wrong() -> Vec<(IndexFaultKind, Change)> {
    vec![
        (IndexFaultKind::MissingTensor, |index| {
            index["weight_map"]["mtp.fc.weight"] = json!(FIRST);
        }),
        (IndexFaultKind::MissingTensor, |index| {
            index["weight_map"]["lm_head.weight"] = json!(FIRST);
        }),
        (IndexFaultKind::Misplaced, |index| {
            index["weight_map"]["model.norm.weight"] = json!(FIRST);
        }),
        (IndexFaultKind::Unlisted, |index| {
            index["weight_map"]
                .as_object_mut()
                .unwrap()
                .remove("model.norm.weight");
        }),
        (IndexFaultKind::TotalSize, |index| {
            index["metadata"]["total_size"] = json!(3960);
        }),
    ]
}

#[test]
fn each_fault_is_refused_by_default_and_passed_over_where_it_is_allowed() {
    let (dir, index) = sharded();
    let expected = content(&dir.open().unwrap());
    for (kind, change) in wrong() {
        let mut wrong = index.clone();
        change(&mut wrong);
        dir.index(&wrong);
        let error = dir.open().unwrap_err();
        let text = error.to_string();
        let option =
            format!("`BaseOptions::with_allowed_index_faults([IndexFaultKind::{kind:?}])`");
        assert!(text.contains(&option), "{text}");
        let found = faults(error);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].kind(), kind);
        // Another option is none for it.
        let other = match kind {
            IndexFaultKind::TotalSize => IndexFaultKind::Unlisted,
            _ => IndexFaultKind::TotalSize,
        };
        let options = BaseOptions::new().with_allowed_index_faults([other]);
        assert!(BaseCheckpoint::open_with(dir.path(), &options).is_err());
        let options = BaseOptions::new().with_allowed_index_faults([kind]);
        let opened = BaseCheckpoint::open_with(dir.path(), &options).unwrap();
        assert_eq!(content(&opened), expected);
        assert_eq!(opened.index_faults(), found);
    }
}

/// Loaded, it is the model that Python computes with.
#[test]
fn what_is_passed_over_is_reported_and_the_logits_are_transformers() {
    use crate::base::families::tied_llama;
    let (dir, index) = sharded();
    for (kind, change) in wrong() {
        let mut wrong = index.clone();
        change(&mut wrong);
        dir.index(&wrong);
        let report = tied_llama::check(dir.path(), 0, |options| {
            options.with_allowed_index_faults([kind])
        });
        assert_eq!(report.index_faults.len(), 1);
        assert!(
            report.to_string().contains("1 faults of the index: "),
            "{report}"
        );
    }
}

#[test]
fn of_two_tensors_the_last_is_taken_where_that_is_allowed() {
    let dir = Dir::new();
    let (mut one, other) = (tensor("a", Dtype::F32, &[3]), tensor("a", Dtype::F32, &[3]));
    one.bytes[0] ^= 1;
    let mut index = dir.sharded(&[
        ("1.safetensors", vec![one]),
        ("2.safetensors", vec![other.clone()]),
    ]);
    index["weight_map"]["a"] = json!("1.safetensors");
    index["weight_map"]["b"] = json!("2.safetensors");
    dir.index(&index);
    let kinds = [IndexFaultKind::Duplicate, IndexFaultKind::MissingTensor];
    let options = BaseOptions::new().with_allowed_index_faults(kinds);
    let opened = BaseCheckpoint::open_with(dir.path(), &options).unwrap();
    assert_eq!(opened.read("a").unwrap(), other.bytes);
    assert_eq!(opened.index_faults().len(), 2);
}

#[test]
fn files_below_the_folder_and_missing_files_may_be_allowed_and_files_elsewhere_never() {
    let dir = Dir::new();
    let a = tensor("a", Dtype::F32, &[3]);
    std::fs::create_dir(dir.file("fp32")).unwrap();
    dir.tensors("fp32/m.safetensors", std::slice::from_ref(&a));
    dir.index(&json!({"weight_map": {"a": "fp32/m.safetensors", "b": "gone.safetensors"}}));
    let error = dir.open().unwrap_err();
    assert!(matches!(
        faults(error)[..],
        [IndexFault::NotAFileName { .. }]
    ));
    let kinds = [IndexFaultKind::NotAFileName, IndexFaultKind::MissingShard];
    let options = BaseOptions::new().with_allowed_index_faults(kinds);
    let opened = BaseCheckpoint::open_with(dir.path(), &options).unwrap();
    assert_eq!(
        (opened.len(), opened.read("a").unwrap()),
        (1, a.bytes.clone())
    );
    for elsewhere in [
        "../m.safetensors",
        "/m.safetensors",
        "fp32/../../m.safetensors",
    ] {
        dir.index(&json!({"weight_map": {"a": elsewhere}}));
        assert!(
            BaseCheckpoint::open_with(dir.path(), &options).is_err(),
            "{elsewhere}"
        );
    }
    // Whoever names the files themselves needs no index.
    let files = BaseCheckpoint::from_files([dir.file("fp32/m.safetensors")]).unwrap();
    assert_eq!(files.read("a").unwrap(), a.bytes);
    dir.tensors("again.safetensors", &[a]);
    let both = [
        dir.file("fp32/m.safetensors"),
        dir.file("again.safetensors"),
    ];
    let error = BaseCheckpoint::from_files(both).unwrap_err().to_string();
    assert!(
        error.contains("tensor `a` is in") && error.contains("again"),
        "{error}"
    );
    assert!(BaseCheckpoint::from_files::<&str>([]).is_err());
}

#[test]
fn every_limit_is_an_option() {
    let (dir, _) = sharded();
    let header = tensor(&"x".repeat(200), Dtype::F32, &[1, 1, 1]);
    let single = Dir::new();
    single.tensors("model.safetensors", &[header]);
    let open = |dir: &Dir, limits| {
        BaseCheckpoint::open_with(dir.path(), &BaseOptions::new().with_limits(limits))
    };
    let limits = FileLimits::new;
    for (dir, limits, named) in [
        (&dir, limits().with_shards(2), "FileLimits::shards"),
        (
            &dir,
            limits().with_index_tensors(5),
            "FileLimits::index_tensors",
        ),
        (
            &dir,
            limits().with_index_bytes(9),
            "FileLimits::index_bytes",
        ),
        (
            &single,
            limits().with_header_bytes(9),
            "FileLimits::header_bytes",
        ),
        (
            &single,
            limits().with_name_bytes(199),
            "FileLimits::name_bytes",
        ),
        (&single, limits().with_dimensions(2), "at most 2 sizes"),
        (&dir, limits().with_tensors(1), "FileLimits::tensors"),
    ] {
        let error = open(dir, limits).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    open(&dir, FileLimits::unlimited()).unwrap();
    open(&single, FileLimits::unlimited()).unwrap();
}
