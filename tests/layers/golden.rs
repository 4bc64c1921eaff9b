//! Outputs and gradients of PEFT's own layer (`tests/golden/peft/generate.py`).

use std::collections::BTreeMap;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::adapter::LoraConfig;
use burn_peft::layer::LoraLinear;
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::layers::{device, grad, max_diff, scale, trainable};

#[derive(Deserialize)]
struct Case {
    r: usize,
    lora_alpha: f64,
    use_rslora: bool,
    use_dora: bool,
}

struct File<'a>(SafeTensors<'a>, &'a str);

impl File<'_> {
    fn get<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let view = self.0.tensor(&format!("{}.{name}", self.1)).unwrap();
        let values: Vec<f32> = view
            .data()
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        Tensor::from_data(TensorData::new(values, view.shape().to_vec()), device)
    }
}

#[test]
fn values_and_gradients_are_those_of_peft() {
    let bytes = std::fs::read(crate::golden("peft/lora_linear.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let cases = &header.metadata().as_ref().unwrap()["cases"];
    let cases: BTreeMap<String, Case> = serde_json::from_str(cases).unwrap();
    assert_eq!(cases.len(), 6);
    for (name, case) in &cases {
        let file = File(SafeTensors::deserialize(&bytes).unwrap(), name);
        match name.ends_with("3d") {
            true => check::<3>(name, case, &file),
            false => check::<2>(name, case, &file),
        }
    }
}

fn check<const D: usize>(name: &str, case: &Case, file: &File) {
    let device = device();
    let weight: Tensor<2> = file.get("weight", &device);
    let has_bias = file.0.names().contains(&format!("{name}.bias").as_str());
    let base = Linear {
        weight: Param::from_tensor(weight.transpose()).set_require_grad(false),
        bias: has_bias.then(|| trainable(Param::from_tensor(file.get("bias", &device)))),
    };
    let config = LoraConfig::new(case.r)
        .with_alpha(case.lora_alpha)
        .with_rslora(case.use_rslora);
    let a: Tensor<2> = file.get("lora_A", &device);
    let b: Tensor<2> = file.get("lora_B", &device);
    let layer = LoraLinear {
        base,
        delta: config.with_factors(a.transpose(), b.transpose()).unwrap(),
    };
    let layer = match case.use_dora {
        false => layer,
        true => LoraLinear {
            delta: layer
                .delta
                .with_magnitude(file.get("magnitude", &device))
                .unwrap(),
            ..layer
        },
    };
    let x: Tensor<D> = file.get::<D>("x", &device).require_grad();
    let y = layer.forward(x.clone());
    let gradients = (y.clone() * file.get::<D>("dy", &device)).sum().backward();

    // Sums of at most 32 f32 products in another order than torch's, relative to the largest value.
    let close = |what: &str, diff: f32, scale: f32| {
        assert!(
            diff <= 4e-6 * scale,
            "{name}.{what}: {diff:e} against {scale:e}"
        );
    };
    let expected: Tensor<D> = file.get("y", &device);
    close("y", max_diff(&y, &expected), scale(&expected));
    let expected: Tensor<D> = file.get("dx", &device);
    close(
        "dx",
        max_diff(&grad(&x, &gradients), &expected),
        scale(&expected),
    );
    let expected: Tensor<2> = file.get::<2>("dlora_A", &device).transpose();
    close(
        "dA",
        max_diff(&grad(&layer.delta.a.val(), &gradients), &expected),
        scale(&expected),
    );
    let expected: Tensor<2> = file.get::<2>("dlora_B", &device).transpose();
    close(
        "dB",
        max_diff(&grad(&layer.delta.b.val(), &gradients), &expected),
        scale(&expected),
    );
    if let Some(bias) = &layer.base.bias {
        let expected: Tensor<1> = file.get("dbias", &device);
        close(
            "dbias",
            max_diff(&grad(&bias.val(), &gradients), &expected),
            scale(&expected),
        );
    }
    if let Some(magnitude) = &layer.delta.magnitude {
        let expected: Tensor<1> = file.get("dmagnitude", &device);
        close(
            "dmagnitude",
            max_diff(&grad(&magnitude.val(), &gradients), &expected),
            scale(&expected),
        );
        let expected: Tensor<2> = file.get::<2>("merged", &device).transpose();
        let (merged, _) = layer.merge();
        close(
            "merged",
            max_diff(&merged.weight.val(), &expected),
            scale(&expected),
        );
    }
    assert!(
        layer.base.weight.val().grad(&gradients).is_none(),
        "{name}: the base has a gradient"
    );
}
