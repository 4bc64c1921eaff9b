//! Files of tensors that do not fit or are no files of tensors, and what writing does to files that are there.

use std::fs;

use burn::tensor::{DType, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{
    AdapterFile, CONFIG_FILE, MAX_HEADER_BYTES, Mismatch, ReadOptions, WEIGHTS_FILE, WriteOptions,
};
use serde_json::{Value, json};

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
    assert_eq!(report.loaded, [QB, other]);
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
    for shape in [
        &[][..],
        &[2],
        &[2, 3, 1],
        &[3, 2],
        &[1, 3],
        &[2, 0],
        &[0, 3],
        &[0, usize::MAX],
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
            PeftError::Incomplete { report } => assert_eq!(report.mismatched[0].found, shape),
            other => panic!("{shape:?}: {other}"),
        }
    }
}

#[test]
fn a_file_without_tensors_is_no_adapter() {
    let error = error_of(&[]);
    assert!(
        matches!(inside(&error, WEIGHTS_FILE), PeftError::Incomplete { .. }),
        "{error}"
    );
}

#[test]
fn other_element_types_are_errors_that_name_the_tensor() {
    for (dtype, size) in [
        ("F64", 8),
        ("I64", 8),
        ("I32", 4),
        ("U8", 1),
        ("F8_E4M3", 1),
        ("BOOL", 1),
    ] {
        let header = json!({
            QA: {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * size]},
            QB: f32_entry(&[4, 2], 6 * size),
        });
        let error = Scratch::new()
            .tensors(&header, &vec![0; 6 * size + 32])
            .error();
        match inside(&error, WEIGHTS_FILE) {
            PeftError::DType { tensor, .. } => assert_eq!(tensor, QA),
            other => panic!("{dtype}: {other}"),
        }
    }
}

#[test]
fn factors_of_two_types_are_an_error() {
    let header = json!({
        QA: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        QB: f32_entry(&[4, 2], 12),
    });
    let error = Scratch::new().tensors(&header, &[0; 44]).error();
    match inside(&error, WEIGHTS_FILE) {
        PeftError::DType { tensor, .. } => assert_eq!(tensor, QB),
        other => panic!("{other}"),
    }
}

#[test]
fn values_that_are_not_finite_are_errors_unless_allowed() {
    for (dtype, bits) in [
        ("F32", f32::NAN.to_le_bytes().to_vec()),
        ("F32", f32::NEG_INFINITY.to_le_bytes().to_vec()),
        ("BF16", 0x7f80u16.to_le_bytes().to_vec()),
        ("F16", 0x7e00u16.to_le_bytes().to_vec()),
    ] {
        let size = bits.len();
        let header = json!({
            QA: {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * size]},
            QB: {"dtype": dtype, "shape": [4, 2], "data_offsets": [6 * size, 14 * size]},
        });
        let mut data = vec![0; 14 * size];
        data[5 * size..6 * size].copy_from_slice(&bits);
        let scratch = Scratch::new();
        let error = scratch.tensors(&header, &data).error();
        match inside(&error, WEIGHTS_FILE) {
            PeftError::NotFinite { tensor, index, .. } => {
                assert_eq!((tensor.as_str(), *index), (QA, 5))
            }
            other => panic!("{dtype}: {other}"),
        }
        let options = ReadOptions {
            allow_non_finite: true,
            ..Default::default()
        };
        let adapter = AdapterFile::read(scratch.path(), &options).unwrap();
        assert_eq!(adapter.tensors[0].a.as_bytes(), &data[..6 * size]);
    }
}

/// The whole file or an error: every beginning of it, and every beginning with a byte more.
#[test]
fn a_truncated_file_is_an_error_at_every_byte() {
    let scratch = Scratch::new();
    let bytes = fs::read(scratch.file(WEIGHTS_FILE)).unwrap();
    for end in 0..bytes.len() {
        let error = scratch.weights(&bytes[..end]).error();
        assert!(
            matches!(error, PeftError::Malformed { .. }),
            "{end}: {error}"
        );
    }
    let longer = [&bytes[..], b"\0"].concat();
    assert!(matches!(
        scratch.weights(&longer).error(),
        PeftError::Malformed { .. }
    ));
    scratch.weights(&bytes);
    read(scratch.path()).unwrap();
}

/// One flipped bit of the header may change a name; it never makes a panic, nor more modules than there were.
#[test]
fn a_flipped_bit_never_panics() {
    let scratch = Scratch::new();
    let bytes = fs::read(scratch.file(WEIGHTS_FILE)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for bit in 0..8 * (8 + header) {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Ok(adapter) = read(scratch.weights(&flipped).path()) {
            assert_eq!(adapter.tensors.len(), 2);
        }
    }
}

#[test]
fn garbage_is_an_error() {
    let header = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let tensor = |begin: u64, end: u64| json!({"dtype": "F32", "shape": [1, 1], "data_offsets": [begin, end]});
    let files: [Vec<u8>; 15] = [
        b"PK\x03\x04 a zip file of old".to_vec(),
        u64::MAX.to_le_bytes().to_vec(),
        [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        [&(MAX_HEADER_BYTES + 1).to_le_bytes()[..], b"{}"].concat(),
        header(""),
        header("[]"),
        header("{\"\u{0}\": 1}"),
        [&1u64.to_le_bytes()[..], b"\xff"].concat(),
        header(&"[".repeat(1_000_000)),
        header(r#"{"__metadata__": {"format": 3}}"#),
        // Offsets past the end, reversed, overlapping, with a gap.
        header(&json!({QA: tensor(0, 4)}).to_string()),
        [header(&json!({QA: tensor(4, 0)}).to_string()), vec![0; 4]].concat(),
        [header(&json!({QA: tensor(0, 4), QB: tensor(0, 4)}).to_string()), vec![0; 4]].concat(),
        [header(&json!({QA: tensor(0, 4), QB: tensor(8, 12)}).to_string()), vec![0; 12]].concat(),
        // A shape whose product overflows.
        header(&json!({QA: {"dtype": "F32", "shape": [1u64 << 62, 1u64 << 62], "data_offsets": [0, 0]}}).to_string()),
    ];
    for bytes in files {
        let error = Scratch::new().weights(&bytes).error();
        assert!(matches!(error, PeftError::Malformed { .. }), "{error}");
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
fn missing_files_are_errors_that_name_them() {
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        let scratch = Scratch::new();
        fs::remove_file(scratch.file(name)).unwrap();
        let error = scratch.error();
        assert!(
            matches!(&error, PeftError::Io { path, .. } if path.ends_with(name)),
            "{error}"
        );
        fs::create_dir(scratch.file(name)).unwrap();
        let error = scratch.error();
        assert!(
            matches!(&error, PeftError::Malformed { path, .. } if path.ends_with(name)),
            "{error}"
        );
    }
}

#[test]
fn a_pickle_is_refused_and_not_opened() {
    let scratch = Scratch::new();
    fs::remove_file(scratch.file(WEIGHTS_FILE)).unwrap();
    fs::write(scratch.file("adapter_model.bin"), "cos\nsystem\n").unwrap();
    assert!(scratch.error().to_string().contains("pickle"));
}

/// Opening a pipe would wait for a writer that never comes.
#[cfg(unix)]
#[test]
fn a_pipe_is_refused_without_waiting() {
    let scratch = Scratch::new();
    fs::remove_file(scratch.file(WEIGHTS_FILE)).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(scratch.file(WEIGHTS_FILE))
        .status();
    assert!(made.unwrap().success());
    assert!(matches!(scratch.error(), PeftError::Malformed { .. }));
}

#[test]
fn nothing_is_overwritten_unless_asked() {
    let scratch = Scratch::new();
    let content = || [CONFIG_FILE, WEIGHTS_FILE].map(|name| fs::read(scratch.file(name)).unwrap());
    let before = content();
    let mut other = adapter();
    other.config.lora_alpha = 99.0;
    other.tensors.pop();
    let error = other
        .write(scratch.path(), &WriteOptions::default())
        .unwrap_err();
    assert!(matches!(error, PeftError::Exists { .. }), "{error}");
    assert_eq!(content(), before);

    other
        .write(
            scratch.path(),
            &WriteOptions {
                overwrite: true,
                ..Default::default()
            },
        )
        .unwrap();
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
            AdapterFile {
                tensors: Vec::new(),
                ..super::adapter()
            },
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

#[cfg(unix)]
#[test]
fn files_have_ordinary_modes() {
    use std::os::unix::fs::PermissionsExt;

    let scratch = Scratch::new();
    fs::write(scratch.file("ordinary"), "").unwrap();
    let mode = |name: &str| {
        fs::metadata(scratch.file(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        assert_eq!(mode(name), mode("ordinary"), "{name}");
    }
    assert_ne!(
        mode("ordinary") & 0o044,
        0,
        "the umask of this machine hides what is tested"
    );
}

#[test]
fn a_header_is_read_by_names_that_json_escapes() {
    let header = json!({"\u{1b}[31m\"": f32_entry(&[1, 1], 0)});
    let error = Scratch::new().tensors(&header, &[0; 4]).error();
    let Value::String(name) = json!("\u{1b}[31m\"") else {
        unreachable!()
    };
    let PeftError::Incomplete { report } = inside(&error, WEIGHTS_FILE) else {
        panic!("{error}")
    };
    assert_eq!(report.unexpected, [name]);
    // What is printed holds no control characters, which a terminal would obey.
    assert!(!error.to_string().contains('\u{1b}'), "{error}");
}
