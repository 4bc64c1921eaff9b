//! Whatever `add_adapter` accepts is saved, loaded and resumed with equal values: on generated models, whose names end alike, nest and
//! repeat, with generated adapters.

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    Param,
};
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Embedding, LayerNorm, LayerNormConfig, Linear};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{LoadOptions, NameMap, SaveOptions, WriteOptions};
use burn_peft::model::{BiasMode, PeftConfig, PeftModel, TargetConfig, TrainableTokens};
use burn_peft::nf4::Nf4Config;
use burn_peft::resume::{Checkpoint, Seed};
use proptest::prelude::*;

use super::moved;

/// A module whose fields have names that are known at run time only.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    children: Vec<(String, Node)>,
}

#[derive(Clone, Debug)]
enum Node {
    Tree(Tree),
    Linear(Linear),
    Embedding(Embedding),
    Conv(Conv1d),
    Norm(LayerNorm),
}

/// The same of whatever the node is.
macro_rules! each {
    ($node:expr, $inner:ident => $result:expr) => {
        match $node {
            Node::Tree($inner) => $result,
            Node::Linear($inner) => $result,
            Node::Embedding($inner) => $result,
            Node::Conv($inner) => $result,
            Node::Norm($inner) => $result,
        }
    };
}

/// The same of whatever the node is, in a node again.
macro_rules! node {
    ($node:expr, $inner:ident => $result:expr) => {
        match $node {
            Node::Tree($inner) => Node::Tree($result),
            Node::Linear($inner) => Node::Linear($result),
            Node::Embedding($inner) => Node::Embedding($result),
            Node::Conv($inner) => Node::Conv($result),
            Node::Norm($inner) => Node::Norm($result),
        }
    };
}

impl Tree {
    /// # Panics
    ///
    /// Panics if the shape is that of a layer.
    pub fn new(shape: &Shape, device: &Device) -> Self {
        match shape.node(device) {
            Node::Tree(tree) => tree,
            other => panic!("one layer: {other:?}"),
        }
    }

    fn each(self, mut change: impl FnMut(&str, Node) -> Node) -> Self {
        let children = self.children.into_iter();
        let children = children.map(|(name, node)| {
            let node = change(&name, node);
            (name, node)
        });
        Self {
            children: children.collect(),
        }
    }
}

impl Module for Tree {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (name, node) in &self.children {
            visitor.enter_module(name, "Struct:Tree");
            each!(node, inner => inner.visit(visitor));
            visitor.exit_module(name, "Struct:Tree");
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        self.each(|name, node| {
            mapper.enter_module(name, "Struct:Tree");
            let node = node!(node, inner => inner.map(mapper));
            mapper.exit_module(name, "Struct:Tree");
            node
        })
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.children.iter().fold(
            devices,
            |devices, (_, node)| each!(node, inner => inner.collect_devices(devices)),
        )
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(|_, node| node!(node, inner => inner.to_device(device)))
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|_, node| node!(node, inner => inner.fork(device)))
    }

    fn valid(&self) -> Self {
        self.clone()
            .each(|_, node| node!(node, inner => inner.valid()))
    }

    fn train(self) -> Self {
        self.each(|_, node| node!(node, inner => inner.train()))
    }

    fn materialize(self) -> Self {
        self.each(|_, node| node!(node, inner => inner.materialize()))
    }
}

impl ModuleDisplayDefault for Tree {
    fn content(&self, content: Content) -> Option<Content> {
        content.optional()
    }
}

impl ModuleDisplay for Tree {}

/// What a node is, without its values.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    Tree(Vec<(String, Shape)>),
    Linear(bool),
    Embedding,
    Conv,
    Norm,
}

const WIDTH: usize = 4;

impl Shape {
    fn node(&self, device: &Device) -> Node {
        let random = |dims: [usize; 2]| {
            let values = Tensor::random(dims, Distribution::Normal(0.0, 1.0), device);
            Param::from_tensor(values)
        };
        match self {
            Self::Tree(children) => Node::Tree(Tree {
                children: children
                    .iter()
                    .map(|(name, shape)| (name.clone(), shape.node(device)))
                    .collect(),
            }),
            Self::Linear(bias) => Node::Linear(Linear {
                weight: random([WIDTH, WIDTH]),
                bias: bias.then(|| Param::from_tensor(Tensor::ones([WIDTH], device))),
            }),
            Self::Embedding => Node::Embedding(Embedding {
                weight: random([6, WIDTH]),
            }),
            Self::Conv => {
                let mut conv = Conv1dConfig::new(WIDTH, WIDTH, 3).init(device);
                let values = Tensor::random([WIDTH, WIDTH, 3], Distribution::Default, device);
                conv.weight = Param::from_tensor(values);
                let bias = Tensor::random([WIDTH], Distribution::Default, device);
                conv.bias = Some(Param::from_tensor(bias));
                Node::Conv(conv)
            }
            Self::Norm => Node::Norm(LayerNormConfig::new(WIDTH).init(device)),
        }
    }
}

/// Names that are ends of each other, with and without a dot between.
const NAMES: [&str; 9] = [
    "fc",
    "pre_fc",
    "head",
    "lm_head",
    "norm",
    "input_norm",
    "0",
    "1",
    "layers",
];

fn name() -> impl Strategy<Value = String> {
    prop::sample::select(&NAMES[..]).prop_map(str::to_owned)
}

fn children(
    shape: impl Strategy<Value = Shape> + 'static,
) -> impl Strategy<Value = Vec<(String, Shape)>> {
    prop::collection::btree_map(name(), shape, 1..5)
        .prop_map(|children| children.into_iter().collect())
}

fn shape() -> impl Strategy<Value = Shape> {
    let leaf = prop_oneof![
        4 => any::<bool>().prop_map(Shape::Linear),
        1 => Just(Shape::Embedding),
        1 => Just(Shape::Conv),
        2 => Just(Shape::Norm),
    ];
    leaf.prop_recursive(3, 24, 4, |shape| children(shape).prop_map(Shape::Tree))
}

#[derive(Clone, Debug)]
struct Adapter {
    targets: Option<Vec<String>>,
    exclude: Vec<String>,
    rank_keys: Vec<(String, usize)>,
    saved: Vec<String>,
    tokens: Option<String>,
    bias: BiasMode,
    dora: bool,
    rslora: bool,
    dropout: bool,
    packed: bool,
}

fn adapter() -> impl Strategy<Value = Adapter> {
    let names = |most| prop::collection::vec(path(), 0..most);
    let targets = prop_oneof![
        1 => Just(None),
        3 => prop::collection::vec(path(), 0..3).prop_map(Some),
    ];
    let bias = prop::sample::select(vec![BiasMode::None, BiasMode::All, BiasMode::LoraOnly]);
    let rank_keys = prop::collection::vec((path(), 1..4usize), 0..3);
    let flags = prop::array::uniform4(prop::bool::weighted(0.25));
    let tokens = prop::option::weighted(0.1, name());
    (targets, names(2), rank_keys, names(2), tokens, bias, flags).prop_map(
        |(targets, exclude, rank_keys, saved, tokens, bias, flags)| Adapter {
            targets,
            exclude,
            rank_keys,
            saved,
            tokens,
            bias,
            dora: flags[0],
            rslora: flags[1],
            dropout: flags[2],
            packed: flags[3],
        },
    )
}

/// A name, or a path of two.
fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        name(),
        (name(), name()).prop_map(|(one, two)| format!("{one}.{two}"))
    ]
}

impl Adapter {
    fn config(&self) -> PeftConfig {
        let mut targets = match &self.targets {
            None => TargetConfig::all_linear(),
            Some(names) => TargetConfig::list(names),
        };
        if !self.exclude.is_empty() {
            targets = targets.with_exclude_modules(&self.exclude);
        }
        for (key, rank) in &self.rank_keys {
            targets = targets.with_rank_pattern(key, *rank);
        }
        let mut lora = LoraConfig::new(2)
            .with_alpha(3.0)
            .with_dora(self.dora)
            .with_rslora(self.rslora);
        if self.dropout {
            lora = lora.with_dropout(0.25);
        }
        let mut config = PeftConfig::new(lora, targets)
            .with_bias(self.bias)
            .with_modules_to_save(&self.saved);
        if let Some(name) = &self.tokens {
            let tokens = [(name.clone(), vec![1, 3])].into();
            config = config.with_trainable_tokens(TrainableTokens::Named(tokens));
        }
        config
    }
}

/// Paths and bits of all that an adapter has.
fn content(model: &PeftModel<Tree>) -> Vec<(String, Vec<u32>)> {
    struct Values(Vec<u32>);

    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let values: Vec<f32> = param.val().into_data().try_into_vec().unwrap();
            self.0.extend(values.into_iter().map(f32::to_bits));
        }
    }

    let changes = model.changes("default").unwrap().into_iter();
    let changes = changes.map(|(path, change)| {
        let mut values = Values(Vec::new());
        change.visit(&mut values);
        (path, values.0)
    });
    changes.collect()
}

/// Paths and bits of all parameters of a module without adapters.
fn parameters(module: &Tree) -> Vec<u32> {
    struct Values(Vec<u32>);

    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let values: Vec<f32> = param.val().into_data().try_into_vec().unwrap();
            self.0.extend(values.into_iter().map(f32::to_bits));
        }
    }

    let mut values = Values(Vec::new());
    module.visit(&mut values);
    values.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_accepted_is_saved_loaded_and_resumed(
        children in children(shape()),
        adapter in adapter(),
    ) {
        let device = super::device();
        let base = Tree::new(&Shape::Tree(children), &device);
        let fresh = || {
            let mut model = PeftModel::new(base.clone());
            if adapter.packed {
                // A model may have no linear layer.
                let _ = model.quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new());
            }
            model
        };
        let config = adapter.config();
        let mut model = fresh();
        let before = model.report();
        if model.add_adapter("default", &config).is_err() {
            prop_assert_eq!(model.report(), before);
            prop_assert_eq!(model.adapters().count(), 0);
            return Ok(());
        }
        let changes = model.changes("default").unwrap().into_iter();
        let changes = changes.map(|(path, change)| (path, moved(change))).collect();
        model.swap_changes("default", &config, changes).unwrap();
        let expected = content(&model);
        let (merged, _) = model.merged().unwrap();
        let merged = parameters(&merged);

        let dir = tempfile::tempdir().unwrap();
        for (place, names) in [
            ("own", NameMap::new()),
            ("renamed", NameMap::new().with_prefix("model", "")),
        ] {
            let save = SaveOptions { names: names.clone(), ..Default::default() };
            let saved = model.save_adapter("default", dir.path().join(place), &save);
            let saved = saved.map_err(|error| TestCaseError::fail(format!("{place}: {error}")))?;
            let mut read = fresh();
            let load = LoadOptions { names, ..Default::default() };
            let report = read.load_adapter("default", &saved, &load);
            let report = report.map_err(|error| TestCaseError::fail(format!("{place}: {error}")))?;
            prop_assert!(report.is_complete());
            prop_assert_eq!(&content(&read), &expected);
            prop_assert_eq!(&parameters(&read.merged().unwrap().0), &merged);
        }

        let file = dir.path().join("checkpoint");
        let checkpoint = Checkpoint { seed: Seed(1), step: 0 };
        let optimizer = AdamWConfig::new().init();
        checkpoint.save(&file, &model, &optimizer, &WriteOptions::default()).unwrap();
        let mut resumed = fresh();
        resumed.add_adapter("default", &config).unwrap();
        let mut other = AdamWConfig::new().init();
        Checkpoint::load(&file, &mut resumed, &mut other).unwrap();
        prop_assert_eq!(content(&resumed), expected);
    }
}
