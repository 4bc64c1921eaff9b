//! A packed weight looks like the dense one to whoever reads its parameter.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::model::{PeftForward, PeftModel, Storage, Stored, TargetConfig};
use burn_peft::nf4::Nf4Config;

use crate::model::{Net, adapted, device, input, values};

/// A third party's attention, which reads the shapes of its weights.
#[derive(Module, Debug)]
struct Attention {
    c_q: Linear,
    c_k: Linear,
}

impl Attention {
    fn new(layout: LinearLayout, device: &Device) -> Self {
        let linear = || LinearConfig::new(96, 64).with_layout(layout).init(device);
        Self {
            c_q: linear(),
            c_k: linear(),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let [d_in, d_out] = self.c_q.weight.dims();
        assert_eq!(x.dims()[1], d_in);
        let q = self.c_q.forward(x.clone()).reshape([-1, d_out as i32]);
        q + self.c_k.forward(x)
    }
}

fn packed(layout: LinearLayout, device: &Device) -> (Attention, PeftModel<Attention>) {
    let dense = Attention::new(layout, device);
    // Initialised, so that both have the same values.
    dense.c_q.weight.val();
    dense.c_k.weight.val();
    let mut model = PeftModel::new(dense.clone());
    model
        .quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new())
        .unwrap();
    (dense, model)
}

fn displayed(module: &impl burn::module::ModuleDisplay) -> String {
    module.format(Default::default())
}

#[test]
fn shape_dtype_device_count_and_display_are_those_of_the_dense_weight() {
    let device = device();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let (dense, model) = packed(layout, &device);
        let check = |model: &PeftModel<Attention>, what: &str| {
            let (was, is) = (&dense.c_q.weight, &model.c_q.weight);
            assert_eq!(is.lazy_shape().num_elements(), 96 * 64, "{what}");
            assert_eq!(is.dims(), was.dims(), "{what}");
            assert_eq!(is.shape(), was.shape(), "{what}");
            assert_eq!(is.dtype(), was.dtype(), "{what}");
            assert_eq!(is.device(), was.device(), "{what}");
            assert_eq!(is.lazy_shape(), was.lazy_shape(), "{what}");
            assert_eq!(model.module().num_params(), dense.num_params(), "{what}");
            assert_eq!(displayed(&model.c_q), displayed(&dense.c_q), "{what}");
            assert!(!is.is_require_grad(), "{what}");
        };
        check(&model, "packing");
        check(&model.valid(), "valid");
        check(&model.valid().train(), "valid and train");
        check(&model.clone().fork(&device), "fork");
        check(&model.clone().to_device(&device), "to_device");
        check(&model.clone().freeze().unfreeze(), "freeze and unfreeze");
        check(&PeftModel::new(model.clone().unload().unwrap()), "unload");
        let record = model.clone().into_record();
        check(&packed(layout, &device).1.load_record(record), "a record");
        let x = Tensor::ones([3, 96], &device);
        let exact = |module: &Attention| values(&module.forward(x.clone()));
        assert_eq!(
            exact(model.module()),
            exact(&model.clone().materialize()),
            "Burn's own forward"
        );
    }
}

#[test]
fn the_raw_base_is_nan_and_never_part_of_a_result() {
    let device = device();
    let (_, model) = packed(LinearLayout::Row, &device);
    assert!(
        values(&model.c_q.weight.base())
            .iter()
            .all(|value| value.is_nan())
    );
    assert!(
        values(&model.c_q.weight.val())
            .iter()
            .all(|value| value.is_finite())
    );
}

#[test]
fn records_are_small_and_those_of_empty_bases_load() {
    let device = device();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let (_, model) = packed(layout, &device);
        // Read by a third party before it is recorded.
        assert_eq!(model.c_q.weight.dims(), [96, 64]);
        let bytes = model.clone().into_record().into_bytes().unwrap();
        let packed_bytes = model.report().nf4_bytes;
        assert!(bytes.len() < packed_bytes + 4096, "{}", bytes.len());
        // What versions before this one wrote is the same: a base of `[0, 0]`.
        let shapes = shapes(model.clone().into_record());
        assert!(
            shapes.contains(&("c_q.weight".into(), vec![0, 0])),
            "{shapes:?}"
        );
        let (_, other) = packed(layout, &device);
        // Twice, and after the shape was read.
        let mut other = other;
        for _ in 0..2 {
            assert_eq!(other.c_q.weight.dims(), [96, 64]);
            let record = ModuleRecord::from_bytes(bytes.clone()).unwrap();
            other = other.load_record(record);
        }
        assert_eq!(
            values(&other.c_q.weight.val()),
            values(&model.c_q.weight.val())
        );
        assert_eq!(other.c_q.weight.id, model.c_q.weight.id);
        assert_eq!(other.c_q.weight.dims(), [96, 64]);
    }
}

/// Paths and shapes of what a record holds.
fn shapes(record: ModuleRecord) -> Vec<(String, Vec<usize>)> {
    let reader = burn_pack::Reader::from_bytes(record.into_bytes().unwrap()).unwrap();
    let tensors = reader.into_tensors().unwrap().into_iter();
    tensors
        .map(|tensor| {
            let (path, _, shape, _, _) = tensor.into_parts().unwrap();
            (path, shape.to_vec())
        })
        .collect()
}

#[test]
fn a_weight_that_becomes_dense_again_saves_and_loads_as_it_did() {
    let device = device();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let (dense, mut model) = packed(layout, &device);
        let expected = shapes(dense.clone().into_record());
        adapted(&mut model, "default", TargetConfig::all_linear());
        let (merged, _) = model.clone().merge_and_unload().unwrap();
        assert_eq!(shapes(merged.clone().into_record()), expected);
        let folded = model.clone().materialize();
        assert_eq!(shapes(folded.clone().into_record()), expected);
        // By Burn alone, which keeps the mappers of the packed parameter.
        let by_burn = model.clone().into_module().materialize();
        assert_eq!(shapes(by_burn.clone().into_record()), expected);
        for module in [merged, folded.into_module(), by_burn] {
            let weight = values(&module.c_q.weight.val());
            let empty = Attention::new(layout, &device);
            let loaded = empty.load_record(module.into_record());
            assert_eq!(values(&loaded.c_q.weight.val()), weight);
            assert!(weight.iter().all(|value| value.is_finite()));
        }
    }
}

fn in_f32<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    values(&tensor.clone().cast(FloatDType::F32))
}

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

/// What a mapper reads of its parameters.
#[derive(Default)]
struct Dims(Vec<Vec<usize>>);

impl ModuleMapper for Dims {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.0.push(param.dims().to_vec());
        param
    }
}

impl ModuleVisitor for Dims {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.dims().to_vec());
    }
}

#[test]
fn walks_see_dense_shapes_and_a_cast_is_one_of_the_dense_weight() {
    let device = device();
    let (dense, model) = packed(LinearLayout::Row, &device);
    let (mut expected, mut visited, mut mapped) = <(Dims, Dims, Dims)>::default();
    dense.visit(&mut expected);
    model.visit(&mut visited);
    assert_eq!(visited.0, expected.0);
    let bytes = |model: &PeftModel<Attention>| {
        let (weights, bytes) = (model.report().nf4_bytes, Storage::of(model));
        assert_eq!(bytes.bytes_of(Stored::Nf4), weights);
        assert_eq!(bytes.bytes_of(Stored::Uninitialized), 0);
        bytes.bytes()
    };
    let before = bytes(&model);
    let model = model.map(&mut mapped);
    assert_eq!(mapped.0, expected.0);
    assert_eq!(bytes(&model), before);
    let exact = values(&model.c_q.weight.val());
    let cast = model.map(&mut Cast(DType::BF16));
    assert_eq!(cast.c_q.weight.dtype(), DType::BF16);
    assert_eq!(cast.c_q.weight.val().dtype(), DType::BF16);
    // Rounded once from the codes.
    let rounded = Tensor::<1>::from_floats(&exact[..], &device).cast(FloatDType::BF16);
    assert_eq!(in_f32(&cast.c_q.weight.val()), in_f32(&rounded));
    let back = cast.map(&mut Cast(DType::F32));
    assert_eq!(
        values(&back.c_q.weight.val()),
        exact,
        "the codes kept theirs"
    );
}

#[test]
fn adapters_on_dense_and_packed_weights_keep_the_look_and_the_values() {
    let device = device();
    device.seed(91);
    let net = Net::new(&device);
    let mut model = PeftModel::new(net.clone());
    model
        .quantize_nf4(&TargetConfig::list(["up"]), &Nf4Config::new())
        .unwrap();
    adapted(&mut model, "default", TargetConfig::all_linear());
    for (is, was) in model.blocks.iter().zip(&net.blocks) {
        assert_eq!(is.up.weight.dims(), was.up.weight.dims());
        assert_eq!(is.down.weight.dims(), was.down.weight.dims());
        // Burn counts the factors among the layer's parameters, packed or not.
        let shown = |linear: &Linear| {
            displayed(linear)
                .split_once(", params")
                .unwrap()
                .0
                .to_owned()
        };
        assert_eq!(shown(&is.up), shown(&was.up));
    }
    let x = input(&device);
    let expected = values(&model.forward_peft(x.clone()));
    let twice = model.valid().train().fork(&device);
    assert_eq!(values(&twice.forward_peft(x.clone())), expected);
    let h = Tensor::<2>::ones([3, 32], &device);
    let y = model.blocks[0].up.forward_peft(h.clone());
    let dense = model.blocks[0].up.forward(h);
    let difference = (y - dense).abs().max().into_scalar::<f32>();
    assert!(difference < 1e-4, "{difference}");
}
