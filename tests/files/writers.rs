//! Adapters as writers other than PEFT leave them: other keys, other layouts, another configuration.

use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{AdapterFile, CONFIG_FILE, MLX_WEIGHTS_FILE, WEIGHTS_FILE};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::{Scratch, adapter, golden, inside, read};

/// The adapter of [`adapter`], its keys as other writers call them.
#[test]
fn keys_of_other_writers_are_read() {
    let renamed = |rename: &dyn Fn(&str) -> String| {
        let scratch = Scratch::new();
        let bytes = fs::read(scratch.file(WEIGHTS_FILE)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(key, view)| (rename(key), view));
        scratch.weights(&safetensors::serialize(tensors, None).unwrap());
        read(scratch.path())
    };
    let expected = adapter().tensors;
    let prefix = "base_model.model.";
    for rename in [
        &(|key: &str| key.strip_prefix(prefix).unwrap().to_owned()) as &dyn Fn(&str) -> String,
        &|key: &str| key.replace(prefix, "base_model.model._orig_mod."),
        &|key: &str| key.replace(".weight", ".default.weight"),
        &|key: &str| key.strip_suffix(".weight").unwrap().to_owned(),
        // torchtune's.
        &|key: &str| key.strip_prefix(prefix).unwrap().to_lowercase(),
    ] {
        assert_eq!(renamed(rename).unwrap().tensors, expected);
    }
    // Two adapters in one file: one of them has no place, and is named.
    let scratch = Scratch::new();
    let bytes = fs::read(scratch.file(WEIGHTS_FILE)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().flat_map(|(key, view)| {
        ["one", "two"].map(|name| {
            (
                key.replace(".weight", &format!(".{name}.weight")),
                view.clone(),
            )
        })
    });
    scratch.weights(&safetensors::serialize(tensors, None).unwrap());
    let error = scratch.error();
    let PeftError::Incomplete { report } = inside(&error, WEIGHTS_FILE) else {
        panic!("{error}")
    };
    assert_eq!((report.loaded.len(), report.unexpected.len()), (4, 4));
    assert!(report.unexpected.iter().all(|key| key.contains(".two.")));
}

/// What mlx-lm would have written for an adapter of one rank and scale, in f32.
fn write_mlx(dir: &Path, file: &AdapterFile, scale: f64) {
    let transposed = |data: &TensorData| {
        let tensor = Tensor::<2>::from_data(data.clone(), &Default::default());
        // Row-major again.
        let [rows, columns] = tensor.dims();
        let values: Vec<f32> = tensor.transpose().into_data().try_into_vec().unwrap();
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        (vec![columns, rows], bytes)
    };
    let mut tensors = Vec::new();
    for module in &file.tensors {
        let path = &module.path;
        let (shape, bytes) = transposed(&module.a);
        tensors.push((format!("{path}.lora_a"), shape, bytes));
        let (shape, bytes) = transposed(&module.b);
        tensors.push((format!("{path}.lora_b"), shape, bytes));
        if let Some(m) = &module.magnitude {
            tensors.push((
                format!("{path}.m"),
                m.shape().to_vec(),
                m.as_bytes().to_vec(),
            ));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(dir.join(MLX_WEIGHTS_FILE), bytes).unwrap();
    let kind = if file.config.use_dora { "dora" } else { "lora" };
    let config = json!({
        "model": "elsewhere", "fine_tune_type": kind, "num_layers": 2, "seed": 0,
        "lora_parameters": { "rank": file.config.r, "scale": scale, "dropout": 0.0 },
    });
    fs::write(dir.join(CONFIG_FILE), config.to_string()).unwrap();
}

#[test]
fn a_directory_of_mlx_holds_the_same_adapter() {
    for name in ["lora", "dora"] {
        let expected = read(&golden(name)).unwrap();
        let (r, alpha) = (expected.config.r, expected.config.lora_alpha);
        let dir = tempfile::tempdir().unwrap();
        write_mlx(dir.path(), &expected, alpha / r as f64);
        let found = read(dir.path()).unwrap();
        assert_eq!(found.tensors, expected.tensors, "{name}");
        assert_eq!((found.config.r, found.config.use_dora), (r, name == "dora"));
        assert!((found.config.lora_alpha - alpha).abs() < 1e-12);
        // Every module by its path: what `num_layers` left out is not a target.
        let paths: Vec<_> = found
            .tensors
            .iter()
            .map(|module| module.path.clone())
            .collect();
        assert_eq!(
            found.config.targets,
            burn_peft::model::TargetConfig::list(paths)
        );
    }
}

#[test]
fn a_directory_of_mlx_that_does_not_fit_is_an_error_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = adapter();
    write_mlx(dir.path(), &file, 1.0);
    assert!(read(dir.path()).is_ok());

    // Of another rank than the configuration's.
    file.config.r = 3;
    write_mlx(dir.path(), &file, 1.0);
    let error = read(dir.path()).unwrap_err();
    let PeftError::Incomplete { report } = inside(&error, MLX_WEIGHTS_FILE) else {
        panic!("{error}")
    };
    let mismatch = &report.mismatched[0];
    assert_eq!(mismatch.tensor, "layers.0.q.lora_a");
    assert_eq!(
        (&mismatch.expected[..], &mismatch.found[..]),
        (&[3, 3][..], &[2, 3][..])
    );

    fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
    let error = read(dir.path()).unwrap_err();
    inside(&error, CONFIG_FILE);
    fs::remove_file(dir.path().join(CONFIG_FILE)).unwrap();
    let error = read(dir.path()).unwrap_err().to_string();
    assert!(error.contains(CONFIG_FILE), "{error}");
}
