//! Whatever goes wrong in the middle, the model is as it was.

use std::fs;

use burn::module::Module;
use burn::tensor::Device;
use burn_peft::PeftError;
use burn_peft::format::{BASE_FILE, BaseOptions, Dtype};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use crate::base::files::Dir;
use crate::base::model::{Net, content, initialized, names, tensor_of, tensors};

fn nf4() -> BaseOptions {
    BaseOptions::new().with_nf4(TargetConfig::all_linear(), Nf4Config::new())
}

/// A model whose weights are there, and one whose are not, refuse a load and are what they were.
fn refused(load: impl Fn(&mut PeftModel<Net>) -> PeftError) -> PeftError {
    let mut lazy = PeftModel::new(Net::new(&Device::flex()));
    let before = initialized(&lazy);
    load(&mut lazy);
    assert_eq!(initialized(&lazy), before);
    let mut model = PeftModel::new(Net::new(&Device::flex()));
    let before = content(&model);
    let error = load(&mut model);
    assert_eq!(content(&model), before);
    assert_eq!(model.num_params(), Net::new(&Device::flex()).num_params());
    error
}

#[test]
fn a_value_that_is_not_finite_is_named_by_file_and_place() {
    for (name, shape, transposed) in names() {
        let packed = transposed && name != "lm_head.weight";
        if !packed {
            continue;
        }
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let n: usize = shape.iter().product();
            for (at, bad) in [
                (0, f32::NAN),
                (n - 1, f32::INFINITY),
                (n / 2, f32::NEG_INFINITY),
            ] {
                let mut values = vec![0.5; n];
                values[at] = bad;
                // Not the first to be found.
                values[n - 1] = bad;
                let mut tensors = tensors(dtype);
                let place = tensors.iter_mut().find(|tensor| tensor.name == name);
                *place.unwrap() = tensor_of(name, dtype, &shape, values);
                let dir = Dir::new();
                dir.tensors(BASE_FILE, &tensors);
                let error = refused(|model| model.load_base(dir.path(), &nf4()).unwrap_err());
                let PeftError::InFile { path, source } = error else {
                    panic!("{error}");
                };
                assert_eq!(path, dir.file(BASE_FILE));
                let PeftError::NotFinite {
                    tensor,
                    index,
                    value,
                } = *source
                else {
                    panic!("{source}");
                };
                assert_eq!((tensor.as_str(), index), (name, at));
                assert_eq!(value.is_nan(), bad.is_nan());
                // Dense ones are values like others.
                let mut model = PeftModel::new(Net::new(&Device::flex()));
                model.load_base(dir.path(), &BaseOptions::new()).unwrap();
            }
        }
    }
}

#[test]
fn a_file_that_is_cut_while_it_is_read_is_an_error_of_any_tensor() {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, &tensors(Dtype::BF16));
    let path = dir.file(BASE_FILE);
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let bytes = whole.len() - header;
    for left in [0, 1, bytes / 3, bytes - 1] {
        for options in [nf4(), BaseOptions::new()] {
            let error = refused(|model| {
                fs::write(&path, &whole).unwrap();
                let checkpoint = dir.open().unwrap();
                // The same file: it was opened, and is cut.
                let file = fs::File::options().write(true).open(&path).unwrap();
                file.set_len((header + left) as u64).unwrap();
                let mut module = model.module().clone();
                let error = checkpoint.load_into(&mut module, &options).unwrap_err();
                *model = PeftModel::new(module);
                error
            });
            let PeftError::Malformed { path: of, reason } = error else {
                panic!("{error}");
            };
            assert_eq!(of, path);
            assert!(reason.contains("the file ends before"), "{reason}");
        }
    }
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let dir = Dir::new();
    let mut tensors = tensors(Dtype::F32);
    tensors.pop();
    dir.tensors(BASE_FILE, &tensors);
    let error = refused(|model| model.load_base(dir.path(), &nf4()).unwrap_err());
    assert!(matches!(error, PeftError::BaseMismatch { .. }));
    let error = refused(|model| model.load_base(dir.file("none"), &nf4()).unwrap_err());
    assert!(matches!(error, PeftError::Io { .. }));
}
