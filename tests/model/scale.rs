//! Tens of thousands of modules, as mixtures of experts have them: all that is accepted is saved, loaded and resumed, in time that is
//! linear in the modules.

use std::time::Instant;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor};
use burn_peft::adapter::{Combination, LoraConfig};
use burn_peft::format::{
    AdapterFile, LoadOptions, NameMap, ReadOptions, SaveOptions, WriteOptions,
};
use burn_peft::model::{BiasMode, PeftConfig, PeftForward, PeftModel, TargetConfig, TargetModules};
use burn_peft::resume::{Checkpoint, Seed};

use super::{moved, values};

#[derive(Module, Debug)]
struct Expert {
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Experts {
    experts: Vec<Expert>,
    router: Linear,
}

const LAYERS: usize = 40;

#[derive(Module, Debug)]
struct Many {
    layers: Vec<Experts>,
}

impl Many {
    /// So many linear modules, all small, beside a router for each layer.
    fn new(modules: usize, device: &Device) -> Self {
        let linear = || Linear {
            weight: Param::from_tensor(Tensor::ones([2, 2], device)),
            bias: Some(Param::from_tensor(Tensor::zeros([2], device))),
        };
        let expert = || Expert {
            up: linear(),
            down: linear(),
        };
        let experts = || Experts {
            experts: (0..modules / LAYERS / 2).map(|_| expert()).collect(),
            router: linear(),
        };
        Self {
            layers: (0..LAYERS).map(|_| experts()).collect(),
        }
    }

    /// Of one expert in each layer.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let chosen = self.layers.iter().enumerate().map(|(layer, experts)| {
            let expert = &experts.experts[layer * 7 % experts.experts.len()];
            (expert, &experts.router)
        });
        chosen.fold(x, |x, (expert, router)| {
            let y = expert.down.forward_peft(expert.up.forward_peft(x));
            router.forward_peft(y).tanh()
        })
    }
}

/// Runs a part of the test and says how long it took.
fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = run();
    println!("{what}: {:.2} s", start.elapsed().as_secs_f64());
    result
}

fn whole_life(modules: usize) {
    println!("{modules} modules");
    let device = super::device();
    let x = Tensor::ones([1, 2], &device);
    // Ranks that differ from module to module, in no pattern, and saved biases.
    let mut targets = TargetConfig::all_linear().with_exclude_modules(["router"]);
    for layer in 0..LAYERS {
        for expert in (layer % 5..modules / LAYERS / 2).step_by(5) {
            let path = format!("layers.{layer}.experts.{expert}.up");
            targets = targets.with_rank_pattern(path, 2);
        }
    }
    let config = PeftConfig::new(LoraConfig::new(1), targets).with_bias(BiasMode::LoraOnly);
    let mut model = PeftModel::new(Many::new(modules, &device));
    let report = timed("add", || model.add_adapter("default", &config).unwrap());
    assert_eq!(report.targets.matched.len(), modules);
    let changes = timed("changes", || model.changes("default").unwrap());
    let changes = changes.into_iter();
    let changes: Vec<_> = changes
        .map(|(path, change)| (path, moved(change)))
        .collect();
    timed("swap", || {
        model.swap_changes("default", &config, changes).unwrap();
    });
    let y = values(&model.forward(x.clone()));
    let dir = tempfile::tempdir().unwrap();
    for (name, names) in [
        ("own", NameMap::new()),
        (
            "renamed",
            NameMap::new().with_prefix("model.layers", "layers"),
        ),
    ] {
        let save = SaveOptions {
            names: names.clone(),
            ..Default::default()
        };
        let at = dir.path().join(name);
        let at = timed("save", || {
            model.save_adapter("default", &at, &save).unwrap()
        });
        let load = LoadOptions {
            names,
            ..Default::default()
        };
        let mut read = PeftModel::new(Many::new(modules, &device));
        let report = timed("load", || read.load_adapter("default", &at, &load).unwrap());
        assert!(report.is_complete());
        assert_eq!(values(&read.forward(x.clone())), y, "{name}");
    }

    let path = dir.path().join("checkpoint");
    let checkpoint = Checkpoint {
        seed: Seed(1),
        step: 0,
    };
    let optimizer = AdamWConfig::new().init();
    timed("checkpoint", || {
        checkpoint
            .save(&path, &model, &optimizer, &WriteOptions::default())
            .unwrap();
    });
    let mut resumed = PeftModel::new(Many::new(modules, &device));
    resumed.add_adapter("default", &config).unwrap();
    let mut other = AdamWConfig::new().init();
    timed("resume", || {
        Checkpoint::load(&path, &mut resumed, &mut other).unwrap();
    });
    assert_eq!(values(&resumed.forward(x.clone())), y);

    // Adapters of adapters: no biases, which cannot be combined.
    let plain = PeftConfig::new(LoraConfig::new(1), TargetConfig::list(["up"]));
    timed("second", || model.add_adapter("plain", &plain).unwrap());
    timed("combine", || {
        model
            .add_weighted_adapter("both", &[("plain", 0.5)], Combination::Cat)
            .unwrap();
    });
    timed("choose", || model.set_adapter("both").unwrap());
    timed("delete", || model.delete_adapter("both").unwrap());
    timed("rename", || model.rename_adapter("plain", "other").unwrap());
    timed("merge", || model.merged().unwrap());
}

#[test]
fn many_modules_are_attached_saved_loaded_resumed_and_merged() {
    whole_life(2_000);
}

/// What is written stays within what is read.
#[test]
fn forty_thousand_modules_are_attached_and_saved_and_their_file_is_read() {
    let modules = 40_000;
    let device = Device::default();
    let mut targets = TargetConfig::all_linear().with_exclude_modules(["router"]);
    targets.rank_pattern = (0..LAYERS)
        .map(|layer| (format!("layers.{layer}.experts.{layer}.up"), 2))
        .collect();
    let config = PeftConfig::new(LoraConfig::new(1), targets);
    let mut model = PeftModel::new(Many::new(modules, &device));
    let report = timed("add", || model.add_adapter("default", &config).unwrap());
    assert_eq!(report.targets.matched.len(), modules);
    let dir = tempfile::tempdir().unwrap();
    let save = SaveOptions::default();
    let at = timed("save", || {
        model.save_adapter("default", dir.path(), &save).unwrap()
    });
    let file = timed("read", || {
        AdapterFile::read(&at, &ReadOptions::default()).unwrap()
    });
    assert_eq!(file.tensors.len(), modules);
    assert_eq!(
        file.config.targets.target_modules,
        TargetModules::List(vec!["up".into(), "down".into()])
    );
}
