//! Packed weights on whatever device Burn defaults to: `BURN_DEVICE=wgpu cargo test --release --features wgpu --test
//! devices`, and so on for other backends. The host reference is the oracle.

use burn::tensor::{Device, Distribution, FloatDType, Tensor, TensorData};
use burn_peft::adapter::LoraConfig;
use burn_peft::layer::{Adapted, Nf4Linear};
use burn_peft::nf4::{BlockSize, Nf4Config, Nf4Data, Nf4Weight};

/// `[d_out, d_in]`: rows that are no multiple of a block, odd counts, a partial last block, several groups of scales.
const SHAPES: [[usize; 2]; 6] = [[1, 1], [3, 5], [7, 96], [48, 64], [33, 65], [300, 129]];

fn random(shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor
        .into_data()
        .convert_dtype(burn::tensor::DType::F32)
        .try_into_vec()
        .unwrap()
}

fn configs() -> impl Iterator<Item = Nf4Config> {
    [32, 64, 256].into_iter().flat_map(|block| {
        let config = Nf4Config::new().with_block_size(BlockSize::new(block).unwrap());
        [config, config.with_double_quant(true)]
    })
}

/// `left [n, k] · right [k, m]` in f64.
fn product(left: &[f32], right: &[f32], [n, k, m]: [usize; 3]) -> Vec<f64> {
    let at = |i: usize, j: usize| -> f64 {
        (0..k)
            .map(|l| f64::from(left[i * k + l]) * f64::from(right[l * m + j]))
            .sum()
    };
    (0..n * m).map(|index| at(index / m, index % m)).collect()
}

fn transpose(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..rows * columns)
        .map(|i| values[i % rows * columns + i / rows])
        .collect()
}

fn close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let scale = expected
        .iter()
        .fold(1.0, |max: f64, value| max.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= tolerance * scale, "{found} against {expected}");
    }
}

#[test]
fn packed_weights_and_products_are_those_of_the_host() {
    let device = Device::default();
    for [d_out, d_in] in SHAPES {
        for config in configs() {
            let dense = random([d_in, d_out], &device);
            let host = transpose(&values(dense.clone()), [d_in, d_out]);
            let reference = Nf4Data::quantize("w", &host, [d_out, d_in], &config).unwrap();
            let weight = Nf4Weight::quantize("w", dense, &config).unwrap();
            assert_eq!(weight.to_data(), reference, "{d_out}x{d_in} {config:?}");

            let expected = reference.dequantize();
            let found = values(weight.dequantize(FloatDType::F32));
            for (found, expected) in found.iter().zip(&expected) {
                // Equal on a CPU; a GPU may contract the product and sum of a doubly quantised scale.
                let error = (found - expected).abs();
                assert!(
                    error <= 2.0 * f32::EPSILON * expected.abs(),
                    "{found} against {expected}"
                );
            }

            let x = random([5, d_in], &device);
            let y = product(
                &values(x.clone()),
                &transpose(&expected, [d_out, d_in]),
                [5, d_in, d_out],
            );
            // Sums of at most 300 f32 products.
            close(&values(weight.matmul(x)), &y, 1e-5);
            let y = random([5, d_out], &device);
            let x = product(&values(y.clone()), &expected, [5, d_out, d_in]);
            close(&values(weight.matmul_transposed(y)), &x, 1e-5);
        }
    }
}

#[test]
fn gradients_flow_through_packed_layers() {
    let device = Device::default().autodiff();
    for config in configs() {
        let dense = random([40, 24], &device);
        let linear = burn::nn::Linear {
            weight: burn::module::Param::from_tensor(dense),
            bias: None,
        };
        let base = Nf4Linear::from_linear(linear, &config).unwrap();
        let lora = LoraConfig::new(3).with_alpha(5.0);
        let (a, b) = (random([40, 3], &device), random([3, 24], &device));
        let packed = Adapted {
            base: base.clone(),
            delta: lora.with_factors(a.clone(), b.clone()).unwrap(),
        };
        let dense = base.dequantize(FloatDType::F32);
        let dense = Adapted {
            base: dense,
            delta: lora.with_factors(a, b).unwrap(),
        };
        let x = random([6, 40], &device).require_grad();
        let left = packed.forward(x.clone()).powi_scalar(2).sum().backward();
        let right = dense.forward(x.clone()).powi_scalar(2).sum().backward();
        let same = |left: Tensor<2>, right: Tensor<2>| {
            let expected: Vec<f64> = values(right).into_iter().map(f64::from).collect();
            close(&values(left), &expected, 2e-5);
        };
        same(x.grad(&left).unwrap(), x.grad(&right).unwrap());
        for (l, r) in [
            (&packed.delta.a, &dense.delta.a),
            (&packed.delta.b, &dense.delta.b),
        ] {
            same(l.val().grad(&left).unwrap(), r.val().grad(&right).unwrap());
        }
    }
}

#[test]
fn a_packed_weight_moves_between_devices_and_records() {
    use burn::module::Module;
    let device = Device::default();
    let config = Nf4Config::new().with_double_quant(true);
    let weight = Nf4Weight::quantize("w", random([70, 30], &device), &config).unwrap();
    let data = weight.to_data();
    let record = weight.clone().into_record().into_bytes().unwrap();
    let record = burn::store::ModuleRecord::from_bytes(record).unwrap();
    let empty = Nf4Weight::empty([30, 70], &config, &device);
    assert_ne!(empty.to_data(), data);
    assert_eq!(empty.load_record(record).to_data(), data);
    assert_eq!(Nf4Weight::from_data(&data, &device).to_data(), data);
    let x = Tensor::<2>::from_data(TensorData::ones::<f32, _>([1, 70]), &device);
    assert_eq!(
        values(weight.clone().fork(&device).matmul(x.clone())),
        values(weight.matmul(x))
    );
}
