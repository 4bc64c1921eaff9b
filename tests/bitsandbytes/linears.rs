//! Single layers as bitsandbytes' own `Linear4bit` makes a state dictionary of them: block sizes, odd shapes, types.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::FloatDType;
use burn_peft::format::SaveBaseOptions;
use burn_peft::model::Base;

use super::*;

#[derive(Module, Debug)]
pub struct Linears {
    pub plain: Linear,
    pub odd: Linear,
    pub odd_double: Linear,
    pub small: Linear,
    pub groups: Linear,
    pub block128: Linear,
    pub block4096: Linear,
    pub as_f32: Linear,
    pub as_f16: Linear,
    pub as_i8: Linear,
    pub as_f64: Linear,
    pub fp4: Linear,
    pub fp4_double: Linear,
}

impl Linears {
    fn new(layout: LinearLayout) -> Self {
        let linear = |d_out, d_in, bias| {
            let config = LinearConfig::new(d_in, d_out).with_bias(bias);
            config.with_layout(layout).init(&Device::default())
        };
        Self {
            plain: linear(8, 64, true),
            odd: linear(7, 33, false),
            odd_double: linear(33, 65, true),
            small: linear(3, 5, false),
            groups: linear(100, 96, false),
            block128: linear(10, 96, false),
            block4096: linear(9, 500, false),
            as_f32: linear(16, 48, false),
            as_f16: linear(16, 48, true),
            as_i8: linear(5, 6, false),
            as_f64: linear(16, 48, false),
            fp4: linear(7, 33, true),
            fp4_double: linear(12, 64, false),
        }
    }

    fn each(&self) -> [(&str, &Linear); 13] {
        [
            ("plain", &self.plain),
            ("odd", &self.odd),
            ("odd_double", &self.odd_double),
            ("small", &self.small),
            ("groups", &self.groups),
            ("block128", &self.block128),
            ("block4096", &self.block4096),
            ("as_f32", &self.as_f32),
            ("as_f16", &self.as_f16),
            ("as_i8", &self.as_i8),
            ("as_f64", &self.as_f64),
            ("fp4", &self.fp4),
            ("fp4_double", &self.fp4_double),
        ]
    }
}

fn loaded(layout: LinearLayout, options: &BaseOptions) -> PeftModel<Linears> {
    let mut model = PeftModel::new(Linears::new(layout));
    model.load_base(golden("linears"), options).unwrap();
    model
}

#[test]
fn every_shape_block_size_and_type_is_restored_to_the_bit() {
    let options = BaseOptions::new().with_dtype(FloatDType::F32);
    // The least buffer, so that weights are read in parts.
    for options in [options.clone(), options.with_buffer(0)] {
        for layout in [LinearLayout::Row, LinearLayout::Col] {
            let model = loaded(layout, &options);
            let digests = digests("linears");
            assert_eq!(digests.len(), 13);
            for (name, linear) in model.each() {
                let found = digest(linear.weight.val());
                assert_eq!(found, digests[&format!("{name}.weight")], "{name}");
            }
        }
    }
}

#[test]
fn every_byte_is_written_again() {
    let model = loaded(LinearLayout::Row, &BaseOptions::new());
    let scratch = tempfile::tempdir().unwrap();
    model
        .save_base(scratch.path(), &SaveBaseOptions::default())
        .unwrap();
    let (found, expected) = (tensors(scratch.path()), tensors(&golden("linears")));
    let weights = model.report().weights;
    let packed = weights.iter().filter(|weight| weight.base == Base::Nf4);
    assert_eq!(packed.count(), 11);
    for (name, (dtype, _, bytes)) in &expected {
        if name.starts_with("fp4") && name.contains(".weight") {
            continue;
        }
        let (found_dtype, _, found_bytes) = &found[name];
        assert_eq!(found_bytes, bytes, "{name}");
        if !name.starts_with("as_") {
            assert_eq!(found_dtype, dtype, "{name}");
        }
    }
    // FP4 is dense now, in the type of its state.
    assert_eq!(found["fp4.weight"].0, Dtype::F32);
    assert_eq!(found["fp4_double.weight"].0, Dtype::BF16);
    assert_eq!(found["fp4_double.weight"].1, [12, 64]);
}
