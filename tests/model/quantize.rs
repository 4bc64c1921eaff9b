//! Packing the weights of a model.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::model::{Base, PeftModel, TargetConfig};
use burn_peft::nf4::{Nf4Config, Nf4Weight};

use crate::model::{Net, WIDTH, adapted, device, input, max_diff, values};

#[test]
fn packed_weights_are_those_of_the_weight_alone() {
    let device = device();
    device.seed(21);
    let net = Net::new(&device);
    let nf4 = Nf4Config::new();
    let expected = Nf4Weight::quantize("down", net.blocks[0].down.weight.val(), &nf4).unwrap();
    let mut model = PeftModel::new(net.clone());
    let report = model
        .quantize_nf4(&TargetConfig::list(["up", "down"]), &nf4)
        .unwrap();
    assert_eq!(report.weights, 4);
    let weights = 4 * WIDTH * 48;
    assert_eq!(report.dense_bytes, 4 * weights);
    assert_eq!(report.packed_bytes, weights / 2 + 4 * weights / 64);
    let found = model.report();
    assert_eq!(found.nf4_bytes, report.packed_bytes);
    assert!(found.weights.iter().all(|weight| weight.base == Base::Nf4));
    assert_eq!(
        found.total_params,
        net.num_params(),
        "an NF4 weight counts as what it stands for"
    );
    assert_eq!(found.trainable_params, 0);

    let record = model.clone().into_record();
    assert!(!record.is_empty());
    let mut dequantized = net.clone();
    let dense = expected
        .dequantize(burn::tensor::FloatDType::F32)
        .transpose();
    let x = input(&device);
    dequantized.blocks[0].down.weight = Param::from_tensor(dense);
    let mut one = PeftModel::new(net);
    one.quantize_nf4(&TargetConfig::list(["blocks.0.down"]), &nf4)
        .unwrap();
    // f32 sums of 48 terms through four layers.
    assert!(max_diff(&one.forward_peft(x.clone()), &dequantized.forward(x)) <= 1e-5);
}

#[test]
fn quantising_under_an_adapter_keeps_the_adapter() {
    let device = device();
    device.seed(22);
    let x = input(&device);
    let mut after = PeftModel::new(Net::new(&device));
    let mut before = after.clone();
    adapted(&mut after, "default", TargetConfig::all_linear());
    let factors = after.factors("default").unwrap();
    let config = after.config("default").unwrap().clone();
    after
        .quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new())
        .unwrap();
    before
        .quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new())
        .unwrap();
    before.insert_adapter("default", &config, factors).unwrap();
    assert_eq!(
        values(&after.forward_peft(x.clone())),
        values(&before.forward_peft(x))
    );
}

#[test]
fn errors_name_the_weight_and_change_nothing() {
    let device = device();
    let mut net = Net::new(&device);
    let mut bad = values(&net.blocks[1].up.weight.val());
    bad[5 * 48 + 3] = f32::NAN;
    net.blocks[1].up.weight = Param::from_tensor(Tensor::from_data(
        TensorData::new(bad, [WIDTH, 48]),
        &device,
    ));
    let mut model = PeftModel::new(net);
    let before = model.report();
    match model.quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new()) {
        Err(PeftError::NotFinite {
            tensor,
            index,
            value,
        }) => {
            assert_eq!(tensor, "blocks.1.up.weight");
            assert_eq!(index, 3 * WIDTH + 5, "in the [d_out, d_in] layout");
            assert!(value.is_nan());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(model.report(), before);
    model
        .quantize_nf4(&TargetConfig::list(["down"]), &Nf4Config::new())
        .unwrap();
    let error = model
        .quantize_nf4(&TargetConfig::list(["down"]), &Nf4Config::new())
        .unwrap_err();
    assert!(
        matches!(&error, PeftError::AlreadyQuantized { path } if path == "blocks.0.down.weight"),
        "{error}"
    );
}
