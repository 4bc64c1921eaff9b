//! NF4 on the way is what quantising afterwards makes, bit for bit.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::{DType, Device, FloatDType};
use burn_peft::format::{BASE_FILE, BaseOptions, Dtype};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::{BLOCK_SIZES, BlockSize, Nf4Config, Nf4Data, Nf4Weight};
use half::{bf16, f16};

use crate::base::files::{self, Dir};
use crate::base::model::{Net, content, initialized, tensor, tensors, with_threads};

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

fn configs() -> Vec<Nf4Config> {
    let sizes = BLOCK_SIZES.map(|size| BlockSize::new(size).unwrap());
    let configs = sizes.into_iter().flat_map(|size| {
        let config = Nf4Config::new().with_block_size(size);
        [config, config.with_double_quant(true)]
    });
    configs.collect()
}

#[test]
fn packing_on_the_way_is_packing_afterwards() {
    for stored in FLOATS {
        let dir = Dir::new();
        dir.tensors(BASE_FILE, &tensors(stored));
        for config in configs() {
            let targets = TargetConfig::all_linear();
            let mut expected = PeftModel::new(Net::new(&Device::flex()));
            expected.load_base(dir.path(), &BaseOptions::new()).unwrap();
            let quantized = expected.quantize_nf4(&targets, &config).unwrap();
            let expected = content(&expected);
            assert_eq!(quantized.weights, 6, "all but the head");
            for threads in [1, 3] {
                let mut found = PeftModel::new(Net::new(&Device::flex()));
                let options = BaseOptions::new()
                    .with_nf4(targets.clone(), config)
                    .with_buffer(0);
                let report = with_threads(threads, || found.load_base(dir.path(), &options));
                let report = report.unwrap();
                assert_eq!(report.packed, quantized.weights);
                assert_eq!(report.packed_bytes, quantized.packed_bytes as u64);
                let found = content(&found);
                assert_eq!(found.integers, expected.integers);
                assert_eq!(found.floats, expected.floats);
            }
        }
    }
}

/// The codes and scales of a weight as the host quantises it whole.
fn whole(weight: &files::Tensor, config: &Nf4Config) -> Nf4Weight {
    let shape = [weight.shape[0], weight.shape[1]];
    let data = match weight.dtype {
        Dtype::BF16 => quantize::<bf16>(&weight.bytes, shape, config),
        Dtype::F16 => quantize::<f16>(&weight.bytes, shape, config),
        _ => quantize::<f32>(&weight.bytes, shape, config),
    };
    Nf4Weight::from_data(&data, &Device::flex())
}

fn quantize<T: burn_peft::nf4::Nf4Float + bytemuck::Pod>(
    bytes: &[u8],
    shape: [usize; 2],
    config: &Nf4Config,
) -> Nf4Data {
    let values: Vec<T> = bytemuck::pod_collect_to_vec(bytes);
    Nf4Data::quantize("weight", &values, shape, config).unwrap()
}

/// Several parts for each thread, odd counts, rows that end within blocks, one of several buffers.
#[test]
fn parts_of_any_size_give_the_codes_of_the_whole() {
    for (stored, shape) in [
        (Dtype::F32, [97, 2053]),
        (Dtype::BF16, [3, 70_001]),
        (Dtype::F16, [70_003, 3]),
        (Dtype::BF16, [512, 1024]),
    ] {
        let weight = tensor("weight", stored, &shape);
        let dir = Dir::new();
        dir.tensors(BASE_FILE, std::slice::from_ref(&weight));
        for config in configs() {
            let expected = content(&whole(&weight, &config));
            for (threads, buffer) in [(1, 0), (3, 0), (3, 4 << 20), (40, 0)] {
                let [d_out, d_in] = shape;
                for layout in [LinearLayout::Row, LinearLayout::Col] {
                    let linear = LinearConfig::new(d_in, d_out)
                        .with_bias(false)
                        .with_layout(layout)
                        .init(&Device::flex());
                    // A layer by itself has no path that a target could name, so it stands in a list.
                    let mut layers = vec![linear];
                    let options = BaseOptions::new()
                        .with_nf4(TargetConfig::list(["0"]), config)
                        .with_names(burn_peft::format::NameMap::new().with_prefix("only", "0"))
                        .with_buffer(buffer);
                    let mut named = weight.clone();
                    named.name = "only.weight".into();
                    dir.tensors(BASE_FILE, &[named]);
                    let checkpoint = dir.open().unwrap();
                    with_threads(threads, || checkpoint.load_into(&mut layers, &options)).unwrap();
                    let found = content(&layers);
                    let found: Vec<_> = found.integers.into_values().collect();
                    let expected: Vec<_> = expected.integers.values().cloned().collect();
                    assert_eq!(found, expected, "{shape:?} {config:?} {threads} {buffer}");
                    if threads == 40 {
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn what_a_packed_weight_composes_to_has_the_dtype_asked_for() {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, &tensors(Dtype::BF16));
    for (asked, expected) in [
        (None, DType::BF16),
        (Some(FloatDType::F32), DType::F32),
        (Some(FloatDType::F16), DType::F16),
    ] {
        let mut model = PeftModel::new(Net::new(&Device::flex()));
        let options = BaseOptions::new()
            .with_dtype(asked)
            .with_nf4(TargetConfig::all_linear(), Nf4Config::new());
        model.load_base(dir.path(), &options).unwrap();
        let dense = content(&model.into_module().materialize());
        assert_eq!(dense.floats["col.weight"].dtype(), expected);
        assert_eq!(dense.floats["col.weight"].shape().as_slice(), [37, 70]);
        assert_eq!(dense.floats["embed.weight"].dtype(), expected);
    }
}

#[test]
fn a_free_module_is_packed_without_a_peft_model() {
    let weight = tensor("only.weight", Dtype::F32, &[24, 40]);
    let dir = Dir::new();
    dir.tensors(BASE_FILE, std::slice::from_ref(&weight));
    let device = Device::flex();
    let mut layers: Vec<Linear> = vec![LinearConfig::new(40, 24).with_bias(false).init(&device)];
    let options = BaseOptions::new()
        .with_nf4(TargetConfig::list(["0"]), Nf4Config::new())
        .with_names(burn_peft::format::NameMap::new().with_prefix("only", "0"));
    let checkpoint = dir.open().unwrap();
    checkpoint.load_into(&mut layers, &options).unwrap();
    assert!(initialized(&layers).is_empty(), "no dense weight is formed");
    let expected = whole(&weight, &Nf4Config::new()).dequantize(FloatDType::F32);
    assert_eq!(
        layers[0].weight.val().into_data(),
        expected.transpose().into_data()
    );
    assert_eq!(layers.num_params(), 40 * 24, "those of the dense weight");
}
