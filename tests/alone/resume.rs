//! A run that stops and goes on is, to the bit, the run that did not stop.
//!
//! Flex has one random generator for the whole process, so that whatever draws takes its turn here.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use crate::alone;
use burn::module::{Module, Param, ParamGroup};
use burn::nn::Linear;
use burn::optim::{
    AdamWConfig, GradientsAccumulator, GradientsParams, ModuleOptimizer, RmsPropConfig, SgdConfig,
};
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::{Change, LoraConfig, Slices};
use burn_peft::format::WriteOptions;
use burn_peft::model::{AdaptersOnly, BiasMode, PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::optim::{
    AdamW8bitConfig, F32State, LoraPlusGroups, clip_grad_norm, grads_to_f32, lora_plus,
};
use burn_peft::resume::{Checkpoint, Seed};

const KEEP: WriteOptions = WriteOptions {
    overwrite: false,
    keep_existing: false,
    digest: false,
};
const REPLACE: WriteOptions = WriteOptions {
    overwrite: true,
    keep_existing: false,
    digest: false,
};

const STEPS: u64 = 12;
const STOP: u64 = 5;
const MICRO_STEPS: u64 = 2;
const BATCH: usize = 3;
/// No multiple of a step's examples: batches span passes.
const EXAMPLES: usize = 20;
const MAX_NORM: f64 = 0.05;
const CHECKPOINT: &str = "checkpoint.safetensors";

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    second: Linear,
}

impl Net {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = burn::tensor::activation::relu(self.first.forward_peft(x));
        self.second.forward_peft(x)
    }
}

/// Values in [-1, 1) that are the same in every process.
fn fixed<const D: usize>(name: u64, dims: [usize; D], device: &Device) -> Tensor<D> {
    let value = |i| Seed(name).at(i as u64, 0) as i64 as f32 / 2f32.powi(63);
    let values = (0..dims.iter().product()).map(value).collect::<Vec<f32>>();
    Tensor::from_data(TensorData::new(values, dims), device)
}

fn net(device: &Device) -> Net {
    let linear = |name, dims: [usize; 2]| Linear {
        weight: Param::from_tensor(fixed(name, dims, device)),
        bias: Some(Param::from_tensor(fixed(name + 1, [dims[1]], device))),
    };
    Net {
        first: linear(10, [64, 24]),
        second: linear(20, [24, 8]),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Dense,
    Nf4,
    Dora,
    /// Factors in bf16, with an optimiser that has no state: Burn 0.22 would restore it in f32.
    Half,
    /// Two learning rates and two kinds of optimiser, chosen by parameter ids.
    Groups,
    /// Moments in eight bits, and in f32 of the second layer's factors, which are too small.
    EightBit,
    /// Factors in bf16 with moments in eight bits, and gradients accumulated in f32.
    HalfEightBit,
    /// Factors in bf16 with moments in f32 and a residual in bf16.
    HalfCompensated,
    /// Beside the factors, biases of `B`, and copies of the layers' biases and of a whole layer.
    Copies,
}

const KINDS: [Kind; 9] = [
    Kind::Dense,
    Kind::Nf4,
    Kind::Dora,
    Kind::Half,
    Kind::Groups,
    Kind::EightBit,
    Kind::HalfEightBit,
    Kind::HalfCompensated,
    Kind::Copies,
];

fn lora(kind: Kind) -> LoraConfig {
    let dtype = match kind {
        Kind::Half | Kind::HalfEightBit | Kind::HalfCompensated => FloatDType::BF16,
        _ => FloatDType::F32,
    };
    LoraConfig::new(4)
        .with_dropout(0.3)
        .with_dora(kind == Kind::Dora)
        .with_bias(kind == Kind::Copies)
        .with_dtype(dtype)
}

fn device() -> Device {
    Device::default().autodiff()
}

/// A model as a new process builds it: `chance` is what the process happens to draw.
fn model(kind: Kind, chance: u64) -> PeftModel<Net> {
    let device = device();
    device.seed(chance);
    let mut model = PeftModel::new(net(&device));
    let all = TargetConfig::all_linear();
    if kind == Kind::Nf4 {
        model.quantize_nf4(&all, &Nf4Config::new()).unwrap();
    }
    let config = match kind {
        Kind::Copies => PeftConfig::new(lora(kind), TargetConfig::list(["first"]))
            .with_bias(BiasMode::LoraOnly)
            .with_modules_to_save(["second"]),
        _ => PeftConfig::new(lora(kind), all),
    };
    model.add_adapter("trained", &config).unwrap();
    model.add_adapter("resting", &config).unwrap();
    model.set_adapter("trained").unwrap();
    model
}

fn optimizer(kind: Kind, model: &PeftModel<Net>) -> ModuleOptimizer {
    let optimizer: ModuleOptimizer = AdamWConfig::new().with_weight_decay(0.01).init();
    match kind {
        Kind::Half => SgdConfig::new().init(),
        // The `A` of the first layer has 256 values.
        Kind::EightBit => AdamW8bitConfig::new().with_min_8bit_size(200).init(),
        Kind::HalfEightBit => AdamW8bitConfig::new().with_min_8bit_size(0).init(),
        Kind::HalfCompensated => {
            let optimizer = AdamWConfig::new().with_weight_decay(0.01).build();
            F32State::new(optimizer).with_compensation(true).init()
        }
        Kind::Groups => optimizer.with_group(
            LoraPlusGroups::of(model).b,
            RmsPropConfig::new().build(),
            None,
        ),
        _ => optimizer,
    }
}

/// A run, with what it depends on apart so that each can be wrong by itself.
struct Run {
    kind: Kind,
    model: PeftModel<Net>,
    optimizer: ModuleOptimizer,
    order: Seed,
    dropout: Seed,
    data_step: u64,
    step: u64,
    losses: Vec<u32>,
}

impl Run {
    fn fresh(kind: Kind, chance: u64) -> Self {
        let model = model(kind, chance);
        Self {
            kind,
            optimizer: optimizer(kind, &model),
            model,
            order: Seed(7),
            dropout: Seed(7),
            data_step: 0,
            step: 0,
            losses: Vec::new(),
        }
    }

    fn resumed(kind: Kind, chance: u64, path: &Path) -> Self {
        let mut run = Self::fresh(kind, chance);
        let Checkpoint { seed, step } =
            Checkpoint::load(path, &mut run.model, &mut run.optimizer).unwrap();
        (run.order, run.dropout) = (seed, seed);
        (run.data_step, run.step) = (step, step);
        run
    }

    fn save(&self, path: &Path, options: &WriteOptions) -> burn_peft::Result<()> {
        let (seed, step) = (self.order, self.step);
        Checkpoint { seed, step }.save(path, &self.model, &self.optimizer, options)
    }

    fn train(&mut self, until: u64) {
        let device = device();
        let (x, y) = (
            fixed(30, [EXAMPLES, 64], &device),
            fixed(40, [EXAMPLES, 8], &device),
        );
        while self.step < until {
            let mut accumulator = GradientsAccumulator::new();
            for micro_step in 0..MICRO_STEPS {
                let index = self.data_step * MICRO_STEPS + micro_step;
                let batch = self.order.batch(index, BATCH, EXAMPLES);
                let batch: Vec<i64> = batch.into_iter().map(|i| i as i64).collect();
                let batch = Tensor::<1, burn::tensor::Int>::from_data(batch.as_slice(), &device);
                let (x, y) = (
                    x.clone().select(0, batch.clone()),
                    y.clone().select(0, batch),
                );
                self.dropout.seed_device(&device, self.step, micro_step);
                let loss = (self.model.module().forward(x) - y).square().mean();
                self.losses
                    .push(loss.clone().into_scalar::<f32>().to_bits());
                let mut grads = GradientsParams::from_grads(loss.backward(), &self.model);
                if self.kind == Kind::HalfEightBit {
                    grads_to_f32(&self.model, &mut grads);
                }
                accumulator.accumulate(&self.model, grads);
            }
            let mut grads = accumulator.grads();
            let norm = clip_grad_norm(&self.model, &mut grads, MAX_NORM).unwrap();
            assert!(f64::from(norm) > MAX_NORM, "{norm} is not clipped");
            let lr = 0.05 / (1 + self.step) as f64;
            let model = self.model.clone();
            self.model = match self.kind {
                Kind::Groups => {
                    let mut rates = lora_plus(&self.model, lr, 4.0).unwrap();
                    self.optimizer.step(rates.step(), model, grads)
                }
                _ => self.optimizer.step(lr, model, grads),
            };
            self.step += 1;
            self.data_step += 1;
        }
    }

    /// Losses after the stop, and all factors.
    fn end(&self) -> Vec<u32> {
        let kept = ((STEPS - STOP) * MICRO_STEPS) as usize;
        let losses = &self.losses[self.losses.len() - kept..];
        [losses.to_vec(), factors(&self.model)].concat()
    }
}

fn factors(model: &PeftModel<Net>) -> Vec<u32> {
    let mut bits = Vec::new();
    for name in model.adapters() {
        for (_, change) in model.changes(name).unwrap() {
            let data = match change {
                Change::Lora(lora) => {
                    let vectors = lora.magnitude.into_iter().chain(lora.bias);
                    let vectors = vectors.map(|vector| vector.val().into_data());
                    let factors = [lora.a, lora.b].map(|factor| factor.val().into_data());
                    factors.into_iter().chain(vectors).collect()
                }
                Change::Copy(copy) => vec![copy.values.val().into_data()],
                Change::Rows(rows) => vec![rows.rows.val().into_data()],
            };
            for data in data {
                bits.extend(data.iter::<f32>().map(f32::to_bits));
            }
        }
    }
    bits
}

/// Model and optimiser, to see that they were left alone. Burn writes the record of one optimiser in one order; another's,
/// or that of one loaded anew, may have another.
fn state(model: &PeftModel<Net>, optimizer: &ModuleOptimizer) -> (Vec<u32>, Vec<u8>) {
    (factors(model), optimizer.into_bytes().unwrap().to_vec())
}

/// A run that went through, and the checkpoint it left on its way.
fn uninterrupted(kind: Kind, path: &Path) -> Run {
    let mut run = Run::fresh(kind, 1);
    run.train(STOP);
    run.save(path, &KEEP).unwrap();
    run.train(STEPS);
    run
}

const ENV_KIND: &str = "BURN_PEFT_RESUME_KIND";
const ENV_DIR: &str = "BURN_PEFT_RESUME_DIR";

/// The second half of a run in a process of its own, which knows the first by its file alone; nothing by itself.
#[test]
#[ignore = "started by `a_new_process_goes_on_as_if_nothing_had_been`"]
fn second_process() {
    let kind = std::env::var(ENV_KIND).unwrap().parse::<usize>().unwrap();
    let dir = std::env::var_os(ENV_DIR).unwrap();
    let dir = Path::new(&dir);
    let mut run = Run::resumed(KINDS[kind], 99, &dir.join(CHECKPOINT));
    run.train(STEPS);
    let end = run.end().into_iter().flat_map(u32::to_le_bytes);
    std::fs::write(dir.join("end"), end.collect::<Vec<u8>>()).unwrap();
}

#[test]
fn a_new_process_goes_on_as_if_nothing_had_been() {
    if !alone(a_new_process_goes_on_as_if_nothing_had_been) {
        return;
    }
    for (index, kind) in KINDS.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let run = uninterrupted(kind, &dir.path().join(CHECKPOINT));
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "resume::second_process",
                "--ignored",
                "--nocapture",
            ])
            .env(ENV_KIND, index.to_string())
            .env(ENV_DIR, dir.path())
            .output()
            .unwrap();
        assert!(child.status.success(), "{kind:?}: {child:?}");
        let end = std::fs::read(dir.path().join("end")).unwrap();
        let (words, rest) = end.as_chunks::<4>();
        assert!(rest.is_empty());
        let end: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        assert_eq!(end, run.end(), "{kind:?}");
    }
}

type Spoil = fn(&mut Run);

/// What the test above would miss if any of it were of no effect.
#[test]
fn everything_in_a_checkpoint_is_needed() {
    if !alone(everything_in_a_checkpoint_is_needed) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT);
    for kind in KINDS {
        let through = uninterrupted(kind, &path).end();
        let with = |change: Spoil| {
            let mut run = Run::resumed(kind, 99, &path);
            change(&mut run);
            run.train(STEPS);
            run.end()
        };
        assert_eq!(with(|_| ()), through, "{kind:?}");
        let changes: [(&str, Spoil); 6] = [
            ("order", |run| run.order = Seed(8)),
            ("dropout", |run| run.dropout = Seed(8)),
            ("place in the data", |run| run.data_step -= 1),
            ("optimiser", |run| {
                run.optimizer = optimizer(run.kind, &run.model)
            }),
            ("factors", |run| run.model = model(run.kind, 99)),
            // The rate, and the dropout.
            ("step", |run| run.step += 1),
        ];
        for (what, change) in changes {
            if kind == Kind::Half && what == "optimiser" {
                continue;
            }
            let end = match what {
                "step" => {
                    let mut run = Run::resumed(kind, 99, &path);
                    change(&mut run);
                    run.train(STEPS + 1);
                    run.end()
                }
                _ => with(change),
            };
            assert_ne!(end, through, "{kind:?}: {what}");
        }
        std::fs::remove_file(&path).unwrap();
    }
}

/// Ids are keys of the optimiser's state, and every model has its own.
#[test]
fn states_find_their_parameters_by_path() {
    if !alone(states_find_their_parameters_by_path) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT);
    let saved = uninterrupted(Kind::Dense, &path);
    let run = Run::resumed(Kind::Dense, 99, &path);
    let ids = |run: &Run| {
        let factors = run.model.factors("trained").unwrap();
        factors
            .iter()
            .map(|(_, lora)| lora.a.id)
            .collect::<Vec<_>>()
    };
    assert!(ids(&run).iter().all(|id| !ids(&saved).contains(id)));
    // A and B of two layers have two moments each.
    assert_eq!(run.optimizer.to_record().len(), 2 * 2 * 2);
    assert_eq!(run.model.active_adapter(), Some("trained"));
    for (name, trains) in [("trained", true), ("resting", false)] {
        for (_, lora) in run.model.factors(name).unwrap() {
            assert_eq!(lora.a.val().is_require_grad(), trains, "{name}");
            assert_eq!(lora.b.val().is_require_grad(), trains, "{name}");
        }
    }
}

/// What Burn's `Learner` would be given.
#[derive(Module, Debug)]
struct Trainee {
    model: AdaptersOnly<Net>,
}

/// Paths in the optimiser begin with the field's name, and choose the optimisers of groups.
#[test]
fn a_model_inside_of_another_module_is_resumed_too() {
    if !alone(a_model_inside_of_another_module_is_resumed_too) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT);
    let fresh = |chance| {
        let model = model(Kind::Dense, chance).adapters_only();
        let first = ParamGroup::from_predicate("model.first");
        let optimizer = optimizer(Kind::Dense, &model);
        let optimizer = optimizer.with_group(first, RmsPropConfig::new().build(), None);
        (Trainee { model }, optimizer)
    };
    let step = |(trainee, mut optimizer): (Trainee, ModuleOptimizer), at: u64| {
        let device = device();
        Seed(3).seed_device(&device, at, 0);
        let x = fixed(30, [EXAMPLES, 64], &device);
        let loss = trainee.model.module().forward(x).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &trainee);
        (optimizer.step(0.01, trainee, grads), optimizer)
    };
    let (trainee, optimizer) = step(step(fresh(1), 0), 1);
    let checkpoint = Checkpoint {
        seed: Seed(3),
        step: 2,
    };
    checkpoint
        .save(&path, &trainee.model, &optimizer, &KEEP)
        .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for (layer, field) in [
        ("first", "square_avg.square_avg"),
        ("second", "momentum.moment_1"),
    ] {
        let name = format!("optimizer.{layer}.weight.peft.trained.a.{field}");
        assert!(
            bytes
                .windows(name.len())
                .any(|window| window == name.as_bytes()),
            "{name}"
        );
    }
    let (through, _) = step((trainee, optimizer), 2);

    let (mut trainee, mut optimizer) = fresh(2);
    let loaded = Checkpoint::load(&path, &mut trainee.model, &mut optimizer).unwrap();
    assert_eq!(loaded, checkpoint);
    let (resumed, _) = step((trainee, optimizer), 2);
    assert_eq!(factors(&resumed.model), factors(&through.model));
}

#[test]
fn a_checkpoint_of_another_run_is_refused_and_nothing_changes() {
    if !alone(a_checkpoint_of_another_run_is_refused_and_nothing_changes) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT);
    uninterrupted(Kind::Dense, &path);
    let built = |name: &str, config: LoraConfig, targets: TargetConfig| {
        let mut model = PeftModel::new(net(&device()));
        let config = PeftConfig::new(config, targets);
        model.add_adapter(name, &config).unwrap();
        model.add_adapter("resting", &config).unwrap();
        model.set_adapter(name).unwrap();
        model
    };
    let (dense, all) = (lora(Kind::Dense), TargetConfig::all_linear);
    let mut resting = model(Kind::Dense, 2);
    resting.set_adapter("resting").unwrap();
    let mut fewer = model(Kind::Dense, 2);
    fewer.delete_adapter("resting").unwrap();
    let halves = dense.clone().with_slices(Slices::equal([false, true]));
    let halves = built("trained", halves, all());
    let models = [
        ("adapter `trained`", built("another", dense.clone(), all())),
        (
            "rank 4",
            built("trained", LoraConfig::new(3).with_dropout(0.3), all()),
        ),
        ("dropout 0.3", built("trained", LoraConfig::new(4), all())),
        (
            "alpha 8",
            built("trained", dense.clone().with_alpha(9.0), all()),
        ),
        (
            "of `second`",
            built("trained", dense, TargetConfig::list(["first"])),
        ),
        ("on a NF4", model(Kind::Nf4, 2)),
        ("dora true", model(Kind::Dora, 2)),
        ("slices Equal([false, true])", halves),
        ("the active adapter: `trained`", resting),
        ("adapter `resting` of `first`", fewer),
    ];
    for (expected, mut model) in models {
        let mut optimizer = optimizer(Kind::Dense, &model);
        let before = state(&model, &optimizer);
        let error = Checkpoint::load(&path, &mut model, &mut optimizer).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(expected) && text.contains(CHECKPOINT),
            "{expected}: {text}"
        );
        let PeftError::InFile { source, .. } = error else {
            panic!("{error:?}");
        };
        assert!(matches!(*source, PeftError::OtherRun { .. }), "{source:?}");
        assert!(state(&model, &optimizer) == before, "{expected}");
    }

    // An optimiser with a state already, of another kind.
    let eight_bit = AdamW8bitConfig::new().with_min_8bit_size(0);
    let optimizers: [(&str, ModuleOptimizer); 6] = [
        ("codes_1: I32 [64]", eight_bit.init()),
        ("absmax_1", F32State::new(eight_bit.build()).init()),
        ("max_moment_2", AdamWConfig::new().with_amsgrad(true).init()),
        ("here", SgdConfig::new().init()),
        ("square_avg", RmsPropConfig::new().init()),
        ("time: uint", burn::optim::LionConfig::new().init()),
    ];
    for (expected, optimizer) in optimizers {
        let mut run = Run::fresh(Kind::Dense, 3);
        run.optimizer = optimizer;
        run.train(1);
        let before = state(&run.model, &run.optimizer);
        let loaded = Checkpoint::load(&path, &mut run.model, &mut run.optimizer);
        let text = loaded.unwrap_err().to_string();
        assert!(
            text.contains("the optimiser's state of `first.weight"),
            "{text}"
        );
        assert!(text.contains(expected), "{expected}: {text}");
        assert!(state(&run.model, &run.optimizer) == before, "{expected}");
    }
}

#[test]
fn a_damaged_file_is_refused_and_nothing_changes() {
    if !alone(a_damaged_file_is_refused_and_nothing_changes) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT);
    uninterrupted(Kind::Dense, &path);
    let whole = std::fs::read(&path).unwrap();
    let mut run = Run::fresh(Kind::Dense, 3);
    run.train(1);
    let before = state(&run.model, &run.optimizer);
    let mut refused =
        |what: String| match Checkpoint::load(&path, &mut run.model, &mut run.optimizer) {
            Err(PeftError::Malformed { path: found, .. }) => assert_eq!(found, path),
            other => panic!("{what}: {other:?}"),
        };
    // In place: some file systems take their time over thousands of new contents.
    let mut file = File::options().write(true).open(&path).unwrap();
    let mut put = |at: usize, byte: u8| {
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&[byte]).unwrap();
    };
    // Every byte once, in all eight bits by turns.
    for (at, byte) in whole.iter().enumerate() {
        put(at, byte ^ (1 << (at % 8)));
        refused(format!("byte {at}"));
        put(at, *byte);
    }
    assert_eq!(std::fs::read(&path).unwrap(), whole);
    put(whole.len(), 0);
    refused("a byte more".into());
    for length in (0..whole.len()).rev() {
        file.set_len(length as u64).unwrap();
        refused(format!("the first {length} bytes"));
    }
    assert!(state(&run.model, &run.optimizer) == before);

    let missing = dir.path().join("missing");
    for path in [missing.as_path(), dir.path()] {
        let error = Checkpoint::load(path, &mut run.model, &mut run.optimizer).unwrap_err();
        assert!(
            error.to_string().contains(&*path.to_string_lossy()),
            "{error}"
        );
    }
    assert!(state(&run.model, &run.optimizer) == before);
    std::fs::write(&path, whole).unwrap();
    Checkpoint::load(&path, &mut run.model, &mut run.optimizer).unwrap();
    assert_ne!(factors(&run.model), before.0, "the whole file does load");
}

#[test]
fn saving_overwrites_only_when_asked_and_the_same_state_gives_the_same_bytes() {
    if !alone(saving_overwrites_only_when_asked_and_the_same_state_gives_the_same_bytes) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/folder").join(CHECKPOINT);
    let mut run = Run::fresh(Kind::Dense, 1);
    // Before the first step there is no state of the optimiser.
    run.save(&path, &KEEP).unwrap();
    let first = std::fs::read(&path).unwrap();
    assert_eq!(Run::resumed(Kind::Dense, 2, &path).step, 0);

    run.train(1);
    let error = run.save(&path, &KEEP).unwrap_err();
    assert!(
        matches!(&error, PeftError::Exists { path: found } if *found == path),
        "{error}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), first);

    run.save(&path, &REPLACE).unwrap();
    let second = std::fs::read(&path).unwrap();
    assert_ne!(second, first);
    // Also from a model with other parameter ids.
    let again = dir.path().join(CHECKPOINT);
    Run::resumed(Kind::Dense, 2, &path)
        .save(&again, &KEEP)
        .unwrap();
    assert_eq!(std::fs::read(&again).unwrap(), second);
    let files = std::fs::read_dir(path.parent().unwrap()).unwrap();
    assert_eq!(files.count(), 1, "no scratch file is left");
}

#[test]
fn what_a_checkpoint_would_lose_is_an_error() {
    if !alone(what_a_checkpoint_would_lose_is_an_error) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT);
    let mut run = Run::fresh(Kind::Dense, 1);
    let bias = run.model.module().first.bias.as_ref().unwrap().id;
    run.model = run.model.unfreeze_group(ParamGroup::from_ids(vec![bias]));
    let error = run.save(&path, &KEEP).unwrap_err();
    assert!(
        matches!(error, PeftError::OptimizerState { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("`first.bias` trains"), "{error}");
    assert!(!path.exists());
}

/// Burn would restore the moments in f32 and panic at the next step.
#[test]
fn a_state_that_burn_cannot_restore_is_an_error() {
    if !alone(a_state_that_burn_cannot_restore_is_an_error) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT);
    let mut run = Run::fresh(Kind::Half, 1);
    run.optimizer = AdamWConfig::new().init();
    run.train(1);
    match run.save(&path, &KEEP).unwrap_err() {
        PeftError::DType { tensor, found, .. } => {
            assert!(tensor.contains("moment_1 of the optimiser"), "{tensor}");
            assert_eq!(found, "BF16");
        }
        other => panic!("{other:?}"),
    }
    assert!(!path.exists());
}

/// Optimisers with 8-bit moments know their own states, and no other's: neither those of more parameters in f32, nor AdamW's, nor
/// those with a residual.
#[test]
fn eight_bit_states_are_told_apart() {
    if !alone(eight_bit_states_are_told_apart) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for kind in [Kind::EightBit, Kind::HalfCompensated] {
        let path = dir.path().join(format!("{kind:?}.safetensors"));
        uninterrupted(kind, &path);
        let others = [
            AdamW8bitConfig::new().with_min_8bit_size(0).init(),
            AdamW8bitConfig::new().init(),
            F32State::new(AdamWConfig::new().build()).init(),
            F32State::new(AdamW8bitConfig::new().build())
                .with_compensation(true)
                .init(),
            SgdConfig::new().init(),
        ];
        for (index, other) in others.into_iter().enumerate() {
            let mut run = Run::fresh(kind, 3);
            run.optimizer = other;
            run.train(1);
            let before = state(&run.model, &run.optimizer);
            let error = Checkpoint::load(&path, &mut run.model, &mut run.optimizer).unwrap_err();
            let PeftError::InFile { source, .. } = error else {
                panic!("{kind:?} {index}: {error:?}");
            };
            assert!(matches!(*source, PeftError::OtherRun { .. }), "{source:?}");
            assert!(state(&run.model, &run.optimizer) == before, "{index}");
        }
    }
}
