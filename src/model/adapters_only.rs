//! A model that shows its adapters, and nothing else, to whatever walks its parameters.
//!
//! A Burn module is saved, restored and optimised by walks over its parameters. Of an adapted model `W + s·A·B` those that
//! train are `A` and `B` alone; `W`, packed or not, came from a file that is still there. Showing a walk `A` and `B` only
//! makes records and checkpoints as small as the adapters, wherever the model stands inside another module.

use std::ops::{Deref, DerefMut};

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    Param,
};
use burn::tensor::{Bool, Device, Int, Tensor};

use super::peft_model::PeftModel;
use super::weight::{CONTAINER, NF4};

/// A [`PeftModel`] to train and record: its parameters, as far as walks over them go, are the factors of its adapters.
///
/// * A record holds adapters only, active or not, under the paths they have in the model; loading one is strict, and
///   restores parameter ids, to which the state of an optimiser belongs.
/// * Optimisers, casts and [`num_params`](Module::num_params) do not see the base, packed or dense.
/// * Moving between devices and between training and validation takes the whole model along, as does what switches
///   behaviour such as dropout on and off.
///
/// To resume, build the model as it was built before (same base, same quantisation, adapters of the same names and
/// shapes) and load the record. What [`save_adapter`](PeftModel::save_adapter) writes is for use elsewhere: it has no
/// parameter ids, so an optimiser's state does not fit an adapter loaded from it.
///
/// # Training with Burn's `Learner`
///
/// The `Learner` takes a module of your own that implements its steps. Put the model in a field, and the default
/// checkpointers of `SupervisedTraining` write and restore adapters only:
///
/// ```
/// use burn::module::Module;
/// use burn::nn::Linear;
/// use burn::tensor::Tensor;
/// use burn::train::{InferenceStep, RegressionOutput, TrainOutput, TrainStep};
/// use burn_peft::model::{AdaptersOnly, PeftForward};
///
/// #[derive(Module, Debug)]
/// struct Net {
///     linear: Linear,
/// }
///
/// /// What the `Learner` trains: `Trainee { model: peft_model.adapters_only() }`.
/// #[derive(Module, Debug)]
/// struct Trainee {
///     model: AdaptersOnly<Net>,
/// }
///
/// impl TrainStep for Trainee {
///     type Input = (Tensor<2>, Tensor<2>);
///     type Output = RegressionOutput;
///
///     fn step(&self, batch: Self::Input) -> TrainOutput<RegressionOutput> {
///         let output = InferenceStep::step(self, batch);
///         TrainOutput::new(self, output.loss.backward(), output)
///     }
/// }
///
/// impl InferenceStep for Trainee {
///     type Input = (Tensor<2>, Tensor<2>);
///     type Output = RegressionOutput;
///
///     fn step(&self, (x, targets): Self::Input) -> RegressionOutput {
///         let output = self.model.linear.forward_peft(x);
///         let loss = (output.clone() - targets.clone()).square().mean();
///         RegressionOutput { loss, output, targets }
///     }
/// }
/// ```
#[derive(Clone, Debug)]
pub struct AdaptersOnly<M> {
    model: PeftModel<M>,
}

impl<M: Module> PeftModel<M> {
    /// The model as one whose parameters are its adapters' factors: for trainers and checkpoints.
    pub fn adapters_only(self) -> AdaptersOnly<M> {
        AdaptersOnly { model: self }
    }
}

impl<M> AdaptersOnly<M> {
    /// The whole model again.
    pub fn into_inner(self) -> PeftModel<M> {
        self.model
    }
}

impl<M> Deref for AdaptersOnly<M> {
    type Target = PeftModel<M>;

    fn deref(&self) -> &PeftModel<M> {
        &self.model
    }
}

impl<M> DerefMut for AdaptersOnly<M> {
    fn deref_mut(&mut self) -> &mut PeftModel<M> {
        &mut self.model
    }
}

/// A walk that is shown the factors of adapters, and every flag.
struct Factors<'a, W> {
    walk: &'a mut W,
    /// For each module entered, whether it is an adapter or inside one.
    adapter: Vec<bool>,
}

impl<'a, W> Factors<'a, W> {
    fn new(walk: &'a mut W) -> Self {
        Self {
            walk,
            adapter: Vec::new(),
        }
    }

    fn enter(&mut self, name: &str, container: &str) {
        self.adapter
            .push(self.shown() || (container == CONTAINER && name != NF4));
    }

    fn exit(&mut self) {
        self.adapter.pop();
    }

    fn shown(&self) -> bool {
        self.adapter.last().copied().unwrap_or(false)
    }
}

impl<V: ModuleVisitor> ModuleVisitor for Factors<'_, V> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.enter(name, container);
        self.walk.enter_module(name, container);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.exit();
        self.walk.exit_module(name, container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.shown() {
            self.walk.visit_float(param);
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        if self.shown() {
            self.walk.visit_int(param);
        }
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        if self.shown() {
            self.walk.visit_bool(param);
        }
    }

    fn visit_flag(&mut self, flag: &Param<burn::module::Flag>) {
        self.walk.visit_flag(flag);
    }
}

impl<W: ModuleMapper> ModuleMapper for Factors<'_, W> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.enter(name, container);
        self.walk.enter_module(name, container);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.exit();
        self.walk.exit_module(name, container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.shown() {
            self.walk.map_float(param)
        } else {
            param
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        if self.shown() {
            self.walk.map_int(param)
        } else {
            param
        }
    }

    fn map_bool<const D: usize>(
        &mut self,
        param: Param<Tensor<D, Bool>>,
    ) -> Param<Tensor<D, Bool>> {
        if self.shown() {
            self.walk.map_bool(param)
        } else {
            param
        }
    }

    fn map_flag(&mut self, flag: Param<burn::module::Flag>) -> Param<burn::module::Flag> {
        self.walk.map_flag(flag)
    }
}

impl<M: Module> Module for AdaptersOnly<M> {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.model.visit(&mut Factors::new(visitor));
    }

    fn map<F: ModuleMapper>(self, mapper: &mut F) -> Self {
        self.model.map(&mut Factors::new(mapper)).adapters_only()
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.model.collect_devices(devices)
    }

    fn to_device(self, device: &Device) -> Self {
        self.model.to_device(device).adapters_only()
    }

    fn fork(self, device: &Device) -> Self {
        self.model.fork(device).adapters_only()
    }

    fn valid(&self) -> Self {
        self.model.valid().adapters_only()
    }

    fn train(self) -> Self {
        self.model.train().adapters_only()
    }

    fn materialize(self) -> Self {
        self.model.materialize().adapters_only()
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplayDefault for AdaptersOnly<M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add("model", &self.model).optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplay for AdaptersOnly<M> {}

#[cfg(test)]
mod tests {
    use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
    use burn::tensor::{DType, Distribution};

    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::{PeftConfig, PeftForward, TargetConfig};
    use crate::nf4::Nf4Config;

    #[derive(Module, Debug)]
    struct Net {
        packed: Linear,
        dropout: Dropout,
        dense: Linear,
    }

    /// A base of fixed weights with a packed and a dense layer, and two adapters of random factors.
    fn model(device: &Device) -> AdaptersOnly<Net> {
        let linear = |d_in, d_out| Linear {
            weight: Param::from_tensor(Tensor::ones([d_in, d_out], device)),
            ..LinearConfig::new(d_in, d_out).with_bias(false).init(device)
        };
        let net = Net {
            packed: linear(8, 6),
            dropout: DropoutConfig::new(0.5).init(),
            dense: linear(6, 4),
        };
        let mut model = PeftModel::new(net);
        model
            .quantize_nf4(&TargetConfig::list(["packed"]), &Nf4Config::new())
            .unwrap();
        for (name, rank) in [("first", 2), ("second", 3)] {
            let config = PeftConfig::new(LoraConfig::new(rank), TargetConfig::all_linear());
            let random = |dims| Tensor::random(dims, Distribution::Normal(0.0, 1.0), device);
            let factors = [("packed", [8, 6]), ("dense", [6, 4])].map(|(path, [d_in, d_out])| {
                let lora =
                    LoraConfig::new(rank).with_factors(random([d_in, rank]), random([rank, d_out]));
                (path.to_owned(), lora.unwrap())
            });
            model.insert_adapter(name, &config, factors.into()).unwrap();
        }
        model.set_adapter("second").unwrap();
        model.adapters_only()
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_into_vec_as().unwrap()
    }

    fn output(model: &AdaptersOnly<Net>, device: &Device) -> Vec<f32> {
        let x = Tensor::<2>::ones([1, 8], device);
        values(model.dense.forward_peft(model.packed.forward_peft(x)))
    }

    #[test]
    fn a_record_holds_every_adapter_and_nothing_else_and_loads_strictly() {
        let device = Device::default().autodiff();
        let trained = model(&device);
        assert_eq!(Module::num_params(&trained), 5 * (8 + 6) + 5 * (6 + 4));
        let record = trained.clone().into_record();
        assert_eq!(
            record.len(),
            2 * 2 * 2,
            "A and B of two adapters on two layers"
        );

        let loaded = model(&device).try_load_record(record.clone()).unwrap();
        let mut both = [trained, loaded];
        for name in ["second", "first"] {
            for model in &mut both {
                model.set_adapter(name).unwrap();
            }
            let [trained, loaded] = both.each_ref().map(|model| output(model, &device));
            assert_eq!(trained, loaded, "{name}");
        }
        let [trained, loaded] = both.map(|model| model.factors("first").unwrap());
        assert_eq!(trained[0].1.a.id, loaded[0].1.a.id);

        let mut other = model(&device);
        other.delete_adapter("first").unwrap();
        let error = other.try_load_record(record).unwrap_err().to_string();
        assert!(
            error.contains("packed.weight.peft.first.a"),
            "it does not fit another model: {error}"
        );
    }

    /// What a cast of a whole module does.
    struct Cast;

    impl ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| tensor.cast(DType::BF16))
        }
    }

    #[test]
    fn walks_change_factors_and_flags_but_not_the_base() {
        let device = Device::default().autodiff();
        let model = model(&device);
        let packed = |model: &AdaptersOnly<Net>| model.clone().into_inner().unload().unwrap();
        let base = packed(&model).into_record().into_bytes().unwrap();

        let cast = model.clone().map(&mut Cast);
        for name in ["first", "second"] {
            let factors = cast.factors(name).unwrap();
            assert!(
                factors
                    .iter()
                    .all(|(_, lora)| lora.a.val().dtype() == DType::BF16)
            );
        }
        assert_eq!(packed(&cast).into_record().into_bytes().unwrap(), base);

        let x = || Tensor::<2>::ones([1, 64], &device);
        assert_ne!(values(model.dropout.forward(x())), values(x()));
        let frozen = model.freeze();
        assert_eq!(
            values(frozen.dropout.forward(x())),
            values(x()),
            "dropout of the base is frozen too"
        );
    }
}
