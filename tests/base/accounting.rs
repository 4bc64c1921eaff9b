//! Every tensor and every parameter is accounted for, in one error; what may be missing, ignored or tied is said.

use burn::nn::LinearConfig;
use burn::tensor::{Device, FloatDType};
use burn_peft::PeftError;
use burn_peft::format::{
    BASE_FILE, BaseMismatch, BaseOptions, BaseReport, DTypeMismatch, Dtype, Mismatch, NameMap,
};
use burn_peft::model::TargetConfig;
use burn_peft::nf4::Nf4Config;

use crate::base::files::{self, Dir};
use crate::base::model::{Net, content, tensor, tensors};

fn load(tensors: &[files::Tensor], options: &BaseOptions) -> Result<(Net, BaseReport), PeftError> {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, tensors);
    let mut net = Net::new(&Device::flex());
    let report = dir.open()?.load_into(&mut net, options)?;
    Ok((net, report))
}

fn mismatch(tensors: &[files::Tensor], options: &BaseOptions) -> BaseMismatch {
    match load(tensors, options).unwrap_err() {
        PeftError::BaseMismatch { path, report } => {
            assert!(path.ends_with(BASE_FILE));
            *report
        }
        other => panic!("{other}"),
    }
}

/// The tensors of a [`Net`] but for one, which is something else or nothing.
fn with(name: &str, other: Option<files::Tensor>) -> Vec<files::Tensor> {
    let mut tensors = tensors(Dtype::F32);
    tensors.retain(|tensor| tensor.name != name);
    tensors.extend(other);
    tensors
}

#[test]
fn all_that_does_not_fit_is_in_one_error() {
    let mut tensors = tensors(Dtype::F32);
    tensors.retain(|tensor| !["row.bias", "conv2.weight"].contains(&tensor.name.as_str()));
    for tensor in &mut tensors {
        match tensor.name.as_str() {
            "row.weight" => tensor.shape = vec![70, 37],
            "norm.bias" => *tensor = crate::base::files::tensor("norm.bias", Dtype::I64, &[9]),
            "conv1.bias" => *tensor = crate::base::files::tensor("conv1.bias", Dtype::F64, &[7]),
            _ => {}
        }
    }
    tensors.push(tensor("extra\n.weight", Dtype::F32, &[1]));
    tensors.push(files::tensor("extra.mask", Dtype::BOOL, &[1]));
    let found = mismatch(&tensors, &BaseOptions::new());
    assert_eq!(found.missing, ["conv2.weight", "row.bias"]);
    assert_eq!(found.unexpected, ["extra\n.weight", "extra.mask"]);
    let shape = |tensor: &str, expected: &[usize], found: &[usize]| Mismatch {
        tensor: tensor.into(),
        expected: expected.into(),
        found: found.into(),
    };
    let shapes = [
        shape("conv1.bias", &[6], &[7]),
        shape("row.weight", &[37, 70], &[70, 37]),
    ];
    assert_eq!(found.shapes, shapes);
    let dtype = |tensor: &str, found: &str| DTypeMismatch {
        tensor: tensor.into(),
        expected: "F32, BF16 or F16".into(),
        found: found.into(),
    };
    let dtypes = [dtype("conv1.bias", "F64"), dtype("norm.bias", "I64")];
    assert_eq!(found.dtypes, dtypes);
    assert_eq!(found.fitting, 15);
    let text = load(&tensors, &BaseOptions::new()).unwrap_err().to_string();
    for part in [
        "model.safetensors: the checkpoint does not fit the model: 15 tensors fit",
        "2 missing: `conv2.weight`, `row.bias`",
        r"2 unexpected: `extra\n.weight`, `extra.mask`",
        "`row.weight` (expected [37, 70], found [70, 37])",
        "`norm.bias` (expected F32, BF16 or F16, found I64)",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn the_error_is_bounded_when_printed_and_complete_as_a_value() {
    let mut tensors = tensors(Dtype::F32);
    tensors.extend((0..500).map(|i| tensor(&format!("x.{i:03}"), Dtype::F32, &[1])));
    assert_eq!(
        mismatch(&tensors, &BaseOptions::new()).unexpected.len(),
        500
    );
    let text = load(&tensors, &BaseOptions::new()).unwrap_err().to_string();
    assert!(text.contains("`x.019` and 480 more"), "{text}");
    assert!(text.len() < 1000);
}

#[test]
fn a_transposed_square_is_not_told_but_any_other_is() {
    // What a shape cannot tell is not claimed to be checked; the other layouts are.
    for name in [
        "row.weight",
        "col.weight",
        "layers.0.weight",
        "embed.weight",
    ] {
        let mut tensors = tensors(Dtype::BF16);
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == name);
        tensor.unwrap().shape.reverse();
        let found = mismatch(&tensors, &BaseOptions::new());
        assert_eq!(found.shapes.len(), 1, "{name}");
        assert_eq!(found.shapes[0].tensor, name);
    }
}

#[test]
fn tensors_to_ignore_and_parameters_to_leave_are_named() {
    let extra = ["row.rotary_emb.inv_freq", "rotary_emb.inv_freq"];
    let mut given = with("norm.weight", None);
    given.extend(extra.map(|name| files::tensor(name, Dtype::I64, &[3])));
    let options = BaseOptions::new()
        .with_ignored(["rotary_emb.inv_freq"])
        .with_optional(["norm.weight"]);
    let (net, report) = load(&given, &options).unwrap();
    assert_eq!(report.ignored, ["rotary_emb.inv_freq", extra[0]]);
    assert_eq!(report.left, ["norm.weight"]);
    assert_eq!(report.loaded.len(), 19);
    let ones: Vec<f32> = content(&net).floats["norm.gamma"].iter().collect();
    assert_eq!(ones, [1.0; 9], "as it was initialised");
    let text = report.to_string();
    assert!(
        text.contains("1 left as they were: `norm.weight`"),
        "{text}"
    );
    // The end of a name is one of whole segments.
    let options = BaseOptions::new()
        .with_ignored(["emb.inv_freq"])
        .with_optional(["eight"]);
    let found = mismatch(&given, &options);
    assert_eq!((found.missing.len(), found.unexpected.len()), (1, 2));
    // What has a parameter is loaded whatever is ignored.
    let options = BaseOptions::new().with_ignored(["weight"]);
    assert_eq!(
        load(&tensors(Dtype::F32), &options).unwrap().1.loaded.len(),
        20
    );
}

#[test]
fn a_checkpoint_of_which_nothing_fits_is_refused_whatever_may_be_missing() {
    let options = BaseOptions::new()
        .with_optional(["weight", "bias", "running_mean", "running_var"])
        .with_ignored(["a"]);
    let found = mismatch(&[tensor("a", Dtype::F32, &[1])], &options);
    assert_eq!((found.fitting, found.missing.len()), (0, 0));
}

#[test]
fn a_head_of_its_own_takes_the_embedding_where_the_file_has_none() {
    let tied = BaseOptions::new().with_tied("lm_head.weight", "embed.weight");
    let given = with("lm_head.weight", None);
    assert_eq!(
        mismatch(&given, &BaseOptions::new()).missing,
        ["lm_head.weight"]
    );
    let (net, report) = load(&given, &tied).unwrap();
    let names = ("lm_head.weight".to_owned(), "embed.weight".to_owned());
    assert_eq!(report.tied, [names]);
    assert_eq!(report.loaded.len(), 19);
    let floats = content(&net).floats;
    let embed: Vec<f32> = floats["embed.weight"].iter().collect();
    let head: Vec<f32> = floats["lm_head.weight"].iter().collect();
    for (row, column) in [(0, 0), (10, 5), (3, 4)] {
        assert_eq!(head[column * 11 + row], embed[row * 6 + column]);
    }
    // Packed, too.
    let options = tied
        .clone()
        .with_nf4(TargetConfig::list(["lm_head"]), Nf4Config::new());
    assert_eq!(load(&given, &options).unwrap().1.packed, 1);
    // A file that has both is read as it is.
    let (_, report) = load(&tensors(Dtype::F32), &tied).unwrap();
    assert!(report.tied.is_empty());
    // One that has neither lacks both.
    let mut neither = given;
    neither.retain(|tensor| tensor.name != "embed.weight");
    let found = mismatch(&neither, &tied);
    assert_eq!(found.missing, ["embed.weight", "lm_head.weight"]);
}

#[test]
fn a_copy_without_a_parameter_must_be_equal_or_ignored() {
    let copy = |change: &dyn Fn(&mut files::Tensor)| {
        let mut tensors = tensors(Dtype::F32);
        let embed = tensors.iter().find(|tensor| tensor.name == "embed.weight");
        let mut copy = embed.unwrap().clone();
        copy.name = "decoder.weight".into();
        change(&mut copy);
        tensors.push(copy);
        tensors
    };
    let tied = BaseOptions::new().with_tied("decoder.weight", "embed.weight");
    let equal = copy(&|_| {});
    // Equal to the embedding, it needs no option.
    let report = load(&equal, &BaseOptions::new()).unwrap().1;
    assert_eq!(report.equal, ["decoder.weight"]);
    let report = load(&equal, &tied).unwrap().1;
    assert_eq!(report.equal, ["decoder.weight"]);
    // The copy was read, and what it is a copy of once more.
    let all: usize = equal.iter().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(report.read_bytes, all as u64 + 11 * 6 * 4);
    let ignored = BaseOptions::new().with_ignored(["decoder.weight"]);
    let last = 11 * 6 * 4 - 1;
    for unequal in [
        copy(&|copy| copy.bytes[0] ^= 1),
        copy(&|copy| copy.bytes[last] ^= 1),
        copy(&|copy| copy.shape.reverse()),
        copy(&|copy| *copy = tensor("decoder.weight", Dtype::BF16, &[11, 6])),
    ] {
        let found = mismatch(&unequal, &tied);
        let pair = ("decoder.weight".to_owned(), "embed.weight".to_owned());
        assert_eq!(found.unequal, [pair]);
        assert_eq!(
            load(&unequal, &ignored).unwrap().1.ignored,
            ["decoder.weight"]
        );
    }
}

#[test]
fn options_and_maps_out_of_range_are_named() {
    let given = tensors(Dtype::F32);
    let options = BaseOptions::new().with_dtype(FloatDType::F64);
    let text = load(&given, &options).unwrap_err().to_string();
    assert_eq!(text, "dtype = F64: expected F32, BF16 or F16");
    // A map that gives two modules one name.
    let names = NameMap::new().with_segments("row", "col");
    let error = load(&given, &BaseOptions::new().with_names(names)).unwrap_err();
    assert!(
        matches!(&error, PeftError::Config { name, .. } if name == "name map"),
        "{error}"
    );
    let nothing = BaseOptions::new().with_nf4(TargetConfig::list(["q_proj"]), Nf4Config::new());
    let error = load(&given, &nothing).unwrap_err();
    assert!(
        matches!(error, PeftError::UnmatchedPatterns { .. }),
        "{error}"
    );
}

#[test]
fn a_foreign_reparameterization_is_refused() {
    use burn::module::{Lora, Module};
    let dir = Dir::new();
    dir.tensors(BASE_FILE, &[tensor("0.weight", Dtype::F32, &[3, 4])]);
    let linear = LinearConfig::new(4, 3).with_bias(false);
    let layers = vec![linear.init(&Device::flex())];
    let mut layers = layers.apply_lora(Lora::new(2, 2.0));
    let checkpoint = dir.open().unwrap();
    let error = checkpoint.load_into(&mut layers, &BaseOptions::new());
    let error = error.unwrap_err();
    assert!(
        matches!(&error, PeftError::ForeignReparameterization { path, .. } if path == "0.weight"),
        "{error}"
    );
}
