//! EVA: factors from the inputs of a calibration batch.

use std::collections::HashMap;

use burn_peft::PeftError;
use burn_peft::model::{EvaModule, PeftModel};

use super::fresh::Net;
use super::*;

/// Inputs of rank 6 of which each direction has the square of one of these.
const SIGMA: [f32; 6] = [8.0, 6.0, 4.0, 3.0, 0.5, 0.25];
const CLOSE: f32 = 1e-5;

fn share(sigma: &[f32]) -> f64 {
    let sum = |sigma: &[f32]| sigma.iter().map(|&s| f64::from(s * s)).sum::<f64>();
    sum(sigma) / sum(&SIGMA)
}

#[test]
fn a_spans_the_main_directions_of_the_inputs_and_nothing_changes() {
    for dora in [false, true] {
        let [_, up, inputs] = with_singular_values(40, 20, &SIGMA);
        let [_, down, hidden] = with_singular_values(40, 28, &SIGMA);
        let base = Net::new();
        let mut model = PeftModel::new(base.clone());
        let config = LoraConfig::new(3).with_alpha(6.0).with_dora(dora);
        let calibration = HashMap::from([("up".to_owned(), inputs), ("down".to_owned(), hidden)]);
        let report = model
            .add_adapter_eva("eva", &config, &calibration, 1.0)
            .unwrap();
        for EvaModule {
            rank,
            explained,
            path,
        } in &report
        {
            assert_eq!(*rank, 3, "{path}");
            assert!(
                (explained - share(&SIGMA[..3])).abs() < 1e-6,
                "{path}: {explained}"
            );
        }
        for ((path, lora), basis) in model.factors("eva").unwrap().into_iter().zip([up, down]) {
            let a = lora.a.val();
            let gram = a.clone().transpose().matmul(a.clone());
            assert!(error(&gram, &identity(3)) < CLOSE, "{path}");
            // No angle to the first three directions.
            let basis = basis.narrow(1, 0, 3);
            let inside = basis.clone().matmul(basis.transpose().matmul(a.clone()));
            assert!(error(&inside, &a) < CLOSE, "{path}");
            assert_eq!(norm(&lora.b.val()), 0.0);
            assert!(lora.a.is_require_grad() && lora.b.is_require_grad());
        }
        let x = random([5, 20]);
        assert!(error(&model.module().forward(x.clone()), &base.forward(x)) < CLOSE);
    }
}

#[test]
fn ranks_go_where_the_inputs_have_more_directions() {
    let [_, _, few] = with_singular_values(40, 20, &[9.0, 0.1, 0.1]);
    let [_, _, many] = with_singular_values(40, 28, &[2.0, 2.0, 2.0, 2.0]);
    let mut model = PeftModel::new(Net::new());
    let config = LoraConfig::new(2).with_alpha(6.0);
    let calibration = HashMap::from([("up".to_owned(), few), ("down".to_owned(), many)]);
    let report = model
        .add_adapter_eva("eva", &config, &calibration, 2.0)
        .unwrap();
    let ranks: Vec<_> = report
        .iter()
        .map(|module| (module.path.as_str(), module.rank))
        .collect();
    // Of 2 + 2: one of the first module's, and three of the four equal ones.
    assert_eq!(ranks, [("up", 1), ("down", 3)]);
    for (path, lora) in model.factors("eva").unwrap() {
        assert!(
            (lora.scale() - 3.0).abs() < 1e-12,
            "{path}: the scale is kept"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    model
        .save_adapter("eva", dir.path(), &Default::default())
        .unwrap();
    let mut reloaded = PeftModel::new(Net::new());
    let dir = dir.path().join("eva");
    reloaded
        .load_adapter("eva", &dir, &Default::default())
        .unwrap();
    let loaded = reloaded.factors("eva").unwrap();
    assert_eq!(
        loaded
            .iter()
            .map(|(_, lora)| lora.rank())
            .collect::<Vec<_>>(),
        [1, 3]
    );
}

#[test]
fn inputs_that_do_not_fit_are_named_and_change_nothing() {
    let mut model = PeftModel::new(Net::new());
    let config = LoraConfig::new(3);
    let mut add = |path: &str, inputs, rho| {
        let inputs = HashMap::from([(path.to_owned(), inputs)]);
        let error = model
            .add_adapter_eva("eva", &config, &inputs, rho)
            .unwrap_err();
        assert_eq!(model.adapters().count(), 0);
        error
    };
    let error = add("sideways", random([9, 20]), 1.0);
    assert!(matches!(error, PeftError::UnknownModule { path } if path == "sideways"));
    let error = add("up", random([9, 19]), 1.0);
    assert!(matches!(error, PeftError::Shape { tensor, .. } if tensor.contains("`up`")));
    let error = add("up", random([2, 20]), 1.0);
    assert!(matches!(error, PeftError::Config { name, .. } if name == "rank of `up`"));
    for rho in [0.5, f64::NAN, f64::INFINITY] {
        let error = add("up", random([9, 20]), rho);
        assert!(matches!(error, PeftError::Config { name, .. } if name == "rho"));
    }
    let none = model.add_adapter_eva("eva", &config, &HashMap::new(), 1.0);
    assert!(matches!(none, Err(PeftError::NoTargets { .. })));
}
