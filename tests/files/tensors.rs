//! Files of tensors that do not fit or are no files of tensors, and what writing does to files that are there.

use std::fs;

use burn::tensor::{DType, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{
    AdapterFile, CONFIG_FILE, Mismatch, ReadOptions, WEIGHTS_FILE, WriteOptions,
};
use serde_json::json;

use super::{Scratch, adapter, f32_entry, inside, module, read};

const QA: &str = "base_model.model.layers.0.q.lora_A.weight";
const QB: &str = "base_model.model.layers.0.q.lora_B.weight";

/// The error of a file whose tensors, all F32, have these names and shapes.
fn error_of(tensors: &[(&str, &[usize])]) -> PeftError {
    let mut header = json!({});
    let mut end = 0;
    for (name, shape) in tensors {
        header[name] = f32_entry(shape, end);
        end += 4 * shape.iter().product::<usize>();
    }
    Scratch::new().tensors(&header, &vec![0; end]).error()
}

/// DoRA has a magnitude for every module, as long as its factor B is high.
#[test]
fn magnitudes_are_demanded_where_the_configuration_has_dora() {
    let magnitude = "base_model.model.layers.0.q.lora_magnitude_vector";
    let error_of = |magnitude: &[(&str, &[usize])]| {
        let mut header = json!({ QA: f32_entry(&[2, 3], 0), QB: f32_entry(&[4, 2], 24) });
        let mut end = 56;
        for (name, shape) in magnitude {
            header[name] = f32_entry(shape, end);
            end += 4 * shape.iter().product::<usize>();
        }
        let scratch = Scratch::new();
        scratch.set("use_dora", json!(true));
        let error = scratch.tensors(&header, &vec![0; end]).error();
        match inside(&error, WEIGHTS_FILE) {
            PeftError::Incomplete { report } => report.clone(),
            _ => panic!("{error}"),
        }
    };
    assert_eq!(error_of(&[]).missing, [magnitude]);
    let mismatch = &error_of(&[(magnitude, &[1, 4])]).mismatched[0];
    assert_eq!(
        (&mismatch.expected[..], &mismatch.found[..]),
        (&[4][..], &[1, 4][..])
    );
    let mismatch = &error_of(&[(magnitude, &[3])]).mismatched[0];
    assert_eq!(
        (&mismatch.expected[..], &mismatch.found[..]),
        (&[4][..], &[3][..])
    );
}

#[test]
fn all_tensors_that_do_not_fit_are_listed() {
    let stray = "base_model.model.layers.0.q.lora_magnitude_vector";
    let other = "base_model.model.layers.0.v.lora_B.weight";
    let error = error_of(&[
        (QA, &[3, 2]),
        (QB, &[4, 2]),
        (stray, &[4]),
        (other, &[2, 2]),
    ]);
    let PeftError::Incomplete { report } = inside(&error, WEIGHTS_FILE) else {
        panic!("{error}")
    };
    assert!(report.loaded.is_empty(), "{report}");
    assert_eq!(report.left_out, [QB, other]);
    assert_eq!(
        report.missing,
        ["base_model.model.layers.0.v.lora_A.weight"]
    );
    assert_eq!(report.unexpected, [stray]);
    let (expected, found) = (vec![2, 2], vec![3, 2]);
    assert_eq!(
        report.mismatched,
        [Mismatch {
            tensor: QA.into(),
            expected,
            found
        }]
    );
}

#[test]
fn shapes_that_are_no_factors_are_mismatches() {
    for (shape, mismatched) in [
        (&[][..], &[][..]),
        (&[2], &[2]),
        // The factor of a convolution, whose partner is not.
        (&[2, 3, 1], &[4, 2]),
        (&[3, 2], &[3, 2]),
        (&[1, 3], &[1, 3]),
        (&[2, 0], &[2, 0]),
        (&[0, 3], &[0, 3]),
        (&[0, usize::MAX], &[0, usize::MAX]),
    ] {
        let mut header = json!({QB: f32_entry(&[4, 2], 0)});
        let numel = if shape.contains(&0) {
            0
        } else {
            shape.iter().product()
        };
        header[QA] = json!({"dtype": "F32", "shape": shape, "data_offsets": [32, 32 + 4 * numel]});
        let error = Scratch::new()
            .tensors(&header, &vec![0; 32 + 4 * numel])
            .error();
        match inside(&error, WEIGHTS_FILE) {
            PeftError::Incomplete { report } => assert_eq!(report.mismatched[0].found, mismatched),
            other => panic!("{shape:?}: {other}"),
        }
    }
}

#[test]
fn a_file_that_is_larger_than_allowed_is_not_read() {
    let scratch = Scratch::new();
    let size = fs::metadata(scratch.file(WEIGHTS_FILE)).unwrap().len();
    let options = |max_bytes| ReadOptions {
        max_bytes,
        ..Default::default()
    };
    assert!(AdapterFile::read(scratch.path(), &options(size)).is_ok());
    let error = AdapterFile::read(scratch.path(), &options(size - 1)).unwrap_err();
    assert!(matches!(error, PeftError::Malformed { .. }), "{error}");
}

#[test]
fn an_older_adapter_is_replaced_unless_it_is_to_be_kept() {
    let scratch = Scratch::new();
    let content = || [CONFIG_FILE, WEIGHTS_FILE].map(|name| fs::read(scratch.file(name)).unwrap());
    let before = content();
    let mut other = adapter();
    other.config.lora_alpha = 99.0;
    other.tensors.pop();
    for overwrite in [false, true] {
        let keep = WriteOptions {
            keep_existing: true,
            overwrite,
            ..Default::default()
        };
        let error = other.write(scratch.path(), &keep).unwrap_err();
        assert!(matches!(error, PeftError::Exists { .. }), "{error}");
        assert_eq!(content(), before);
    }

    // The second epoch's save.
    let options = WriteOptions::default();
    other.write(scratch.path(), &options).unwrap();
    let found = read(scratch.path()).unwrap();
    assert_eq!((found.config.lora_alpha, found.tensors.len()), (99.0, 1));
    assert_eq!(
        fs::read_dir(scratch.path()).unwrap().count(),
        2,
        "scratch files are left"
    );
}

#[test]
fn tensors_that_could_not_be_read_back_are_not_written() {
    let replaced = |a: TensorData| {
        let mut adapter = adapter();
        adapter.tensors[0].a = a;
        adapter
    };
    let pathed = |path: &str| {
        let mut adapter = adapter();
        adapter.tensors.push(module(path, 2, 3, 3));
        adapter
    };
    for (adapter, expected) in [
        (
            replaced(TensorData::ones::<f32, _>([3, 2])),
            "expected shape [2, 2], found [3, 2]",
        ),
        (
            replaced(TensorData::ones::<f32, _>([2])),
            "expected shape [2, 1], found [2]",
        ),
        (replaced(TensorData::ones::<f64, _>([2, 3])), "found F64"),
        (
            replaced(TensorData::ones::<f32, _>([2, 3]).convert_dtype(DType::BF16)),
            "expected dtype BF16, which its factor A has, found F32",
        ),
        (
            replaced(TensorData::full::<f32, _>([2, 3], f32::NAN)),
            "is not finite",
        ),
        (pathed(""), "``"),
        (pathed("layers..q"), "`layers..q`"),
        (pathed("layers.0.q"), "every module once"),
        (pathed("layers.0.k"), "`layers.0.k`"),
        (
            AdapterFile::new(super::adapter().config, Vec::new()),
            "at least one module",
        ),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("out");
        let error = adapter
            .write(&dir, &WriteOptions::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}: not {expected}");
        assert!(!dir.exists());
    }
}
