//! Every refusal has an option that gets past it, and the report says what became of everything. `docs/loading.md` lists them; a
//! test here holds that the tests it names exist.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{BASE_FILE, BaseOptions, BaseReport, Dtype};
use burn_peft::model::TargetConfig;
use burn_peft::nf4::Nf4Config;

use crate::base::files::{self, Dir};
use crate::base::model::{Net, content, tensor, tensor_of, tensors};

fn load_into<M: Module>(
    module: &mut M,
    tensors: &[files::Tensor],
    options: &BaseOptions,
) -> Result<BaseReport, PeftError> {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, tensors);
    dir.open()?.load_into(module, options)
}

fn without(name: &str) -> Vec<files::Tensor> {
    let mut tensors = tensors(Dtype::F32);
    tensors.retain(|tensor| tensor.name != name);
    tensors
}

fn error(tensors: &[files::Tensor], options: &BaseOptions) -> String {
    let mut net = Net::new(&Device::flex());
    load_into(&mut net, tensors, options)
        .unwrap_err()
        .to_string()
}

fn float(net: &Net, path: &str) -> TensorData {
    content(net).floats[path].clone()
}

#[test]
fn what_is_not_strict_loads_what_fits_and_says_what_did_not() {
    let mut given = without("row.bias");
    given.push(tensor("mtp.fc.weight", Dtype::F32, &[2, 2]));
    given.push(files::tensor("batch.num_batches_tracked", Dtype::I64, &[]));
    given.push(files::tensor(
        "embeddings.position_ids",
        Dtype::I64,
        &[1, 9],
    ));
    let text = error(&given, &BaseOptions::new());
    for part in [
        "1 missing: `row.bias`",
        "3 unexpected: `batch.num_batches_tracked`, `embeddings.position_ids`, `mtp.fc.weight`",
        "options of `BaseOptions` that get past this: `with_optional` or `with_allow_missing`; `with_ignored` or `with_allow_unexpected`",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let mut net = Net::new(&Device::flex());
    let before = float(&net, "row.bias");
    let report = load_into(&mut net, &given, &BaseOptions::new().with_strict(false)).unwrap();
    assert_eq!(report.left, ["row.bias"]);
    assert_eq!(report.ignored.len(), 3);
    assert_eq!(report.loaded.len(), 19);
    assert_eq!(float(&net, "row.bias"), before);
    // The two halves, each by itself, and by name.
    let halves = BaseOptions::new().with_allow_missing(true);
    assert!(error(&given, &halves).contains("3 unexpected"));
    let halves = BaseOptions::new().with_allow_unexpected(true);
    assert!(error(&given, &halves).contains("1 missing"));
    let named = BaseOptions::new()
        .with_ignored_buffers()
        .with_ignored(["mtp.*"])
        .with_optional(["row.bias"]);
    let report = load_into(&mut net, &given, &named).unwrap();
    assert_eq!((report.left.len(), report.ignored.len()), (1, 3));
}

#[test]
fn nothing_at_all_needs_an_option_of_its_own() {
    let given = [tensor("other.weight", Dtype::F32, &[2, 2])];
    let lenient = BaseOptions::new().with_strict(false);
    let text = error(&given, &lenient);
    assert!(
        text.contains("0 tensors fit; nothing fits, which only `with_allow_nothing_loaded` allows"),
        "{text}"
    );
    let mut net = Net::new(&Device::flex());
    let report = load_into(&mut net, &given, &lenient.with_allow_nothing_loaded(true)).unwrap();
    assert_eq!((report.loaded.len(), report.left.len()), (0, 20));
}

#[test]
fn a_parameter_of_another_shape_may_stay_as_it_is() {
    let mut given = without("row.bias");
    given.push(tensor("row.bias", Dtype::F32, &[36]));
    let text = error(&given, &BaseOptions::new());
    assert!(text.contains("`with_ignore_mismatched_sizes`"), "{text}");
    // As in transformers, leniency is not enough.
    assert!(error(&given, &BaseOptions::new().with_strict(false)).contains("1 of another shape"));
    let mut net = Net::new(&Device::flex());
    let before = float(&net, "row.bias");
    let options = BaseOptions::new().with_ignore_mismatched_sizes(true);
    let report = load_into(&mut net, &given, &options).unwrap();
    assert_eq!(report.mismatched.len(), 1);
    assert!(
        report
            .to_string()
            .contains("`row.bias` (expected [37], found [36])"),
        "{report}"
    );
    assert_eq!(float(&net, "row.bias"), before);
}

#[test]
fn a_tensor_of_a_type_that_is_not_read_may_be_skipped_and_f64_is_cast() {
    let mut given = without("row.bias");
    given.push(files::tensor("row.bias", Dtype::I64, &[37]));
    let text = error(&given, &BaseOptions::new());
    assert!(text.contains("`with_dtype` or `with_skipped`"), "{text}");
    let mut net = Net::new(&Device::flex());
    let options = BaseOptions::new().with_skipped(["row.bias"]);
    let report = load_into(&mut net, &given, &options).unwrap();
    assert_eq!(report.left, ["row.bias"]);
    assert_eq!(report.ignored, ["row.bias"]);

    // F64, in order and turned, to each type.
    let values: Vec<f64> = (0..37 * 70)
        .map(|i| f64::from(i) * 1.000_000_1 - 700.0)
        .collect();
    let wide = |name: &str, shape: &[usize]| files::Tensor {
        name: name.to_owned(),
        dtype: Dtype::F64,
        shape: shape.to_vec(),
        bytes: values[..shape.iter().product()]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
    };
    let mut given = without("row.bias");
    given.retain(|tensor| tensor.name != "row.weight");
    given.extend([wide("row.bias", &[37]), wide("row.weight", &[37, 70])]);
    assert!(error(&given, &BaseOptions::new()).contains("found F64"));
    for dtype in [FloatDType::F32, FloatDType::BF16, FloatDType::F16] {
        let options = BaseOptions::new().with_dtype(dtype);
        let report = load_into(&mut net, &given, &options).unwrap();
        let bytes: u64 = given.iter().map(|t| t.bytes.len() as u64).sum();
        assert_eq!(report.read_bytes, bytes);
        let narrow: Vec<f32> = values.iter().map(|v| *v as f32).collect();
        let bias = TensorData::new(narrow[..37].to_vec(), [37]).convert_dtype(DType::from(dtype));
        assert_eq!(float(&net, "row.bias"), bias);
        let weight = Tensor::<2>::from_data(TensorData::new(narrow, [37, 70]), &Device::flex());
        let weight = weight
            .transpose()
            .into_data()
            .convert_dtype(DType::from(dtype));
        assert_eq!(float(&net, "row.weight"), weight);
    }
}

#[test]
fn a_value_that_would_become_infinite_is_an_error_that_names_it() {
    // In a vector, in a matrix that is turned, in one that is packed, and from bf16.
    let at = |name: &str, shape: &[usize], dtype, index: usize, value: f32| {
        let mut values = vec![1.0; shape.iter().product()];
        values[index] = value;
        let mut given = without(name);
        given.push(tensor_of(name, dtype, shape, values));
        given
    };
    let f16 = BaseOptions::new().with_dtype(FloatDType::F16);
    for (given, named) in [
        (
            at("row.bias", &[37], Dtype::F32, 5, 70_000.0),
            "tensor `row.bias`: value 70000 at flat index 5 is infinite in F16",
        ),
        (
            at("row.bias", &[37], Dtype::F32, 5, -65_520.0),
            "value -65520 at flat index 5",
        ),
        (
            at("row.weight", &[37, 70], Dtype::BF16, 71, 1e30),
            "tensor `row.weight`",
        ),
        (
            at("embed.weight", &[11, 6], Dtype::F32, 65, f32::MAX),
            "flat index 65",
        ),
    ] {
        let text = error(&given, &f16);
        assert!(
            text.contains("model.safetensors") && text.contains(named),
            "{text}"
        );
        assert!(
            text.contains("with_dtype") && text.contains("with_allow_overflow"),
            "{text}"
        );
        let mut net = Net::new(&Device::flex());
        load_into(&mut net, &given, &f16.clone().with_allow_overflow(true)).unwrap();
        // What fits in the type asked for is no error, and infinity is what it was.
        load_into(
            &mut net,
            &given,
            &BaseOptions::new().with_dtype(FloatDType::F32),
        )
        .unwrap();
    }
    let infinite = at("row.bias", &[37], Dtype::F32, 5, f32::INFINITY);
    let mut net = Net::new(&Device::flex());
    load_into(&mut net, &infinite, &f16).unwrap();
    let largest = at("row.bias", &[37], Dtype::F32, 5, 65_519.99);
    load_into(&mut net, &largest, &f16).unwrap();
    let bf16 = BaseOptions::new().with_dtype(FloatDType::BF16);
    assert!(error(&at("row.bias", &[37], Dtype::F32, 5, f32::MAX), &bf16).contains("in BF16"));
    // A weight that is packed composes to the type asked for.
    let packed = f16.with_nf4(TargetConfig::list(["row"]), Nf4Config::new());
    let given = at("row.weight", &[37, 70], Dtype::F32, 71, 70_000.0);
    assert!(error(&given, &packed).contains("at flat index 71"));
    load_into(&mut net, &given, &packed.with_allow_overflow(true)).unwrap();
    // f64 that f32 has not.
    let mut given = without("row.bias");
    given.push(files::Tensor {
        name: "row.bias".into(),
        dtype: Dtype::F64,
        shape: vec![37],
        bytes: vec![1e300; 37]
            .into_iter()
            .flat_map(f64::to_le_bytes)
            .collect(),
    });
    let text = error(&given, &BaseOptions::new().with_dtype(FloatDType::F32));
    assert!(
        text.contains("at flat index 0 is infinite in F32"),
        "{text}"
    );
}

/// An embedding, and whatever is beside it in the files.
#[derive(Module, Debug)]
struct Tied {
    wte: Embedding,
    up: Linear,
}

fn tied() -> Tied {
    let device = &Device::flex();
    Tied {
        wte: EmbeddingConfig::new(11, 6).init(device),
        up: LinearConfig::new(6, 8).with_bias(false).init(device),
    }
}

fn tied_tensors(head: impl FnOnce(&mut files::Tensor)) -> Vec<files::Tensor> {
    let wte = tensor("wte.weight", Dtype::F32, &[11, 6]);
    let mut copy = files::Tensor {
        name: "lm_head.weight".into(),
        ..wte.clone()
    };
    head(&mut copy);
    vec![wte, copy, tensor("up.weight", Dtype::F32, &[8, 6])]
}

/// transformers loads such a file without a word; here too, as the values say that the head is the embedding.
#[test]
fn a_head_that_equals_the_embedding_is_accepted_without_an_option() {
    let equal = tied_tensors(|_| {});
    let report = load_into(&mut tied(), &equal, &BaseOptions::new()).unwrap();
    assert_eq!(report.equal, ["lm_head.weight"]);
    // One bit of difference is another head, which the model does not have, also where leniency is asked for.
    let unequal = tied_tensors(|head| head.bytes[100] ^= 1);
    for options in [BaseOptions::new(), BaseOptions::new().with_strict(false)] {
        let error = load_into(&mut tied(), &unequal, &options)
            .unwrap_err()
            .to_string();
        let expected = "1 not equal to what they are tied to: `lm_head.weight` (`wte.weight`)";
        assert!(
            error.contains(expected) && error.contains("`with_ignored`"),
            "{error}"
        );
    }
    let ignored = BaseOptions::new().with_ignored(["lm_head.weight"]);
    load_into(&mut tied(), &unequal, &ignored).unwrap();
    // Of another shape it has nothing to do with the embedding.
    let other = tied_tensors(|head| head.shape = vec![6, 11]);
    let error = load_into(&mut tied(), &other, &BaseOptions::new()).unwrap_err();
    assert!(
        error.to_string().contains("1 unexpected: `lm_head.weight`"),
        "{error}"
    );
}

#[test]
fn tied_tensors_stand_for_each_other_in_either_direction() {
    // The files have the head alone, as transformers allows.
    let mut given = tied_tensors(|_| {});
    given.remove(0);
    let options = BaseOptions::new().with_tied("lm_head.weight", "wte.weight");
    let mut model = tied();
    let report = load_into(&mut model, &given, &options).unwrap();
    let pair = ("wte.weight".to_owned(), "lm_head.weight".to_owned());
    assert_eq!(report.tied, [pair]);
    let floats = content(&model).floats;
    assert_eq!(floats["wte.weight"].as_bytes(), &given[0].bytes[..]);
}

#[test]
fn names_of_other_forms_of_a_file_are_found_and_none_is_taken_twice() {
    let rename = |change: &dyn Fn(&str) -> String| -> Vec<files::Tensor> {
        let mut given = tensors(Dtype::F32);
        for tensor in &mut given {
            tensor.name = change(&tensor.name);
        }
        given
    };
    let options = BaseOptions::new()
        .with_alias("norm.weight", "norm.gamma")
        .with_other_prefix("", "transformer")
        .with_other_prefix("layers", "h");
    for given in [
        rename(&str::to_owned),
        rename(&|name| name.replace("norm.weight", "norm.gamma")),
        rename(&|name| format!("transformer.{name}")),
        rename(&|name| format!("transformer.{}", name.replace("norm.weight", "norm.gamma"))),
        rename(&|name| name.replace("layers.", "h.")),
    ] {
        let mut net = Net::new(&Device::flex());
        let report = load_into(&mut net, &given, &options).unwrap();
        assert_eq!(report.loaded.len(), 20);
    }
    // `conv1.bias` is a parameter's own, and not the other name of another.
    let stolen = BaseOptions::new().with_alias("row.bias", "conv1.bias");
    let given = without("row.bias");
    assert!(error(&given, &stolen).contains("1 missing: `row.bias`"));
    let twice = BaseOptions::new()
        .with_alias("row.bias", "x.bias")
        .with_alias("col.bias", "x.bias");
    let mut given = without("row.bias");
    given.retain(|tensor| tensor.name != "col.bias");
    given.push(tensor("x.bias", Dtype::F32, &[37]));
    let text = error(&given, &twice);
    assert!(
        text.contains("`col.bias` and `row.bias` are both `x.bias`"),
        "{text}"
    );
}

/// Every row of the table of refusals names tests that there are.
#[test]
fn the_table_of_refusals_names_tests() {
    let root = crate::repository();
    let table = std::fs::read_to_string(root.join("docs/loading.md")).unwrap();
    let (_, table) = table.split_once("| Refused by default |").unwrap();
    let mut rows = 0;
    for row in table
        .lines()
        .filter(|line| line.starts_with('|') && line.contains(".rs`"))
    {
        let tests = row.rsplit('|').nth(1).unwrap();
        for group in tests.split(';') {
            let names: Vec<&str> = group.split('`').skip(1).step_by(2).collect();
            let (file, names) = names.split_first().unwrap();
            let source =
                std::fs::read_to_string(root.join(file)).unwrap_or_else(|_| panic!("{file}"));
            assert!(!names.is_empty(), "{row}");
            for name in names {
                assert!(source.contains(&format!("fn {name}()")), "{file}: {name}");
            }
            rows += 1;
        }
    }
    assert!(rows > 25, "{rows}");
}

#[test]
fn names_that_stand_twice_may_be_allowed() {
    use burn_peft::format::{BASE_INDEX_FILE, BaseCheckpoint, FileLimits};
    let dir = Dir::new();
    dir.sharded(&[("1.safetensors", vec![tensor("a", Dtype::F32, &[1])])]);
    let index = r#"{"weight_map": {"a": "gone.safetensors", "a": "1.safetensors"}}"#;
    dir.write(BASE_INDEX_FILE, index);
    let text = dir.open().unwrap_err().to_string();
    assert!(text.contains("the key `a` stands twice"), "{text}");
    let limits = FileLimits::new().with_repeated_names(true);
    let options = BaseOptions::new().with_limits(limits);
    assert_eq!(
        BaseCheckpoint::open_with(dir.path(), &options)
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn a_configuration_that_says_otherwise_may_be_passed_over() {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, &tensors(Dtype::F32));
    let config =
        r#"{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}"#;
    dir.write("config.json", config);
    let load = |options: &BaseOptions| {
        let mut net = Net::new(&Device::flex());
        dir.open().unwrap().load_into(&mut net, options)
    };
    let text = load(&BaseOptions::new()).unwrap_err().to_string();
    assert!(text.contains("`with_ignore_quantization_config`"), "{text}");
    let options = BaseOptions::new().with_ignore_quantization_config(true);
    assert_eq!(load(&options).unwrap().loaded.len(), 20);
}
