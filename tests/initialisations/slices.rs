//! Initialisations of LoRA on slices: each slice's is that of a linear of its own.

use std::collections::HashMap;

use burn_peft::adapter::Slices;
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::layer::LoraLinear;
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig};

use super::fresh::Net;
use super::*;

/// The change is a difference of two equal products of order 10 of sums in f32, relative to outputs of the same order.
const CLOSE: f32 = 1e-5;
const RANK: usize = 2;

/// Of the 28 outputs of `up`.
fn slices() -> Slices {
    Slices::widths([(12, true), (6, false), (10, true)])
}

#[test]
fn a_part_of_the_weight_is_that_of_the_slice() {
    let weight = random([20, 28]);
    for init in [LoraInit::Pissa, LoraInit::Olora] {
        for rslora in [false, true] {
            let config = config(init, RANK).with_rslora(rslora);
            let sliced = config.clone().with_slices(slices());
            let lora = LoraLinear::from_linear(linear(&weight), &sliced)
                .unwrap()
                .delta;
            let (a, b) = (lora.a.val(), lora.b.val());
            assert_eq!((a.dims(), b.dims()), ([20, 2 * RANK], [RANK, 22]));
            for (slice, (start, width, column)) in
                [(0, 12, 0), (18, 10, 12)].into_iter().enumerate()
            {
                let part = weight.clone().narrow(1, start, width);
                let alone = LoraLinear::from_linear(linear(&part), &config)
                    .unwrap()
                    .delta;
                // Signs of singular vectors are the library's: products.
                let found = a.clone().narrow(1, slice * RANK, RANK);
                let found = found.matmul(b.clone().narrow(1, column, width));
                let expected = alone.a.val().matmul(alone.b.val());
                assert!(
                    error(&found, &expected) < CLOSE,
                    "{init:?} of slice {slice}"
                );
            }
        }
    }
}

#[test]
fn a_fresh_one_changes_nothing_and_a_trained_one_is_saved_plain() {
    let x = random([5, 20]);
    for init in [
        LoraInit::Pissa,
        LoraInit::PissaFast { iterations: 4 },
        LoraInit::Olora,
        LoraInit::Orthogonal,
    ] {
        let base = Net::new();
        let lora = config(init, RANK).with_slices(slices());
        let config = PeftConfig::new(lora, TargetConfig::list(["up"]));
        let mut model = PeftModel::new(base.clone());
        model.add_adapter("default", &config).unwrap();
        let fresh = model.module().forward(x.clone());
        assert!(error(&fresh, &base.forward(x.clone())) < CLOSE, "{init:?}");

        let mut factors = model.factors("default").unwrap();
        for (_, lora) in &mut factors {
            assert!(norm(&lora.b.val()) > 0.01, "B of {init:?} is not zero");
            let b = lora.b.val().inner();
            let b = b.clone() + b.random_like(Distribution::Normal(0.0, 0.1));
            lora.b = Param::from_tensor(Tensor::from_inner(b));
        }
        model.swap_adapter("default", &config, factors).unwrap();
        let trained = model.module().forward(x.clone());
        assert!(error(&trained, &fresh) > 1e-3, "{init:?}");
        let dir = tempfile::tempdir().unwrap();
        model
            .save_adapter("default", dir.path(), &SaveOptions::default())
            .unwrap();
        let mut loaded = PeftModel::new(base);
        loaded
            .load_adapter("default", dir.path(), &LoadOptions::default())
            .unwrap();
        assert!(
            error(&loaded.module().forward(x.clone()), &trained) < CLOSE,
            "{init:?}"
        );
        let times = if init.folds() { 4 } else { 2 };
        assert_eq!(loaded.config("default").unwrap().lora.rank, times * RANK);
    }
}

#[test]
fn every_slice_begins_with_the_directions_of_the_inputs() {
    let base = Net::new();
    let mut model = PeftModel::new(base.clone());
    let config = LoraConfig::new(RANK).with_slices(slices());
    let inputs = HashMap::from([("up".to_owned(), random([40, 20]))]);
    model.add_adapter_eva("eva", &config, &inputs, 1.0).unwrap();
    let (_, lora) = model.factors("eva").unwrap().remove(0);
    let a = lora.a.val();
    let first = a.clone().narrow(1, 0, RANK);
    assert_eq!(values(&first), values(&a.narrow(1, RANK, RANK)));
    let gram = first.clone().transpose().matmul(first);
    assert!(error(&gram, &identity(RANK)) < CLOSE);
    let x = random([5, 20]);
    assert_eq!(
        values(&model.module().forward(x.clone())),
        values(&base.forward(x))
    );
}

#[test]
fn a_whole_change_has_no_slices() {
    let config = LoraConfig::new(RANK).with_slices(slices());
    let error = config.from_delta(&random([20, 28])).unwrap_err();
    assert!(error.to_string().contains("slices"), "{error}");
}
