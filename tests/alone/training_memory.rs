//! The memory contract of training over packed weights, in live bytes counted by the allocator.
//!
//! A stack of layers of 1024 x 1024 on 64 tokens. Of each layer only its input and `x·A` may stay between forward and
//! backward, and neither pass may hold a dense weight, nor a large part of one, at any time.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_peft::adapter::{LoraConfig, LoraInit};
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::layer::{LoraLinear, QLoraLinear};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig, TiedHead};
use burn_peft::nf4::Nf4Config;

use crate::{ALLOCATOR, alone};

const WIDTH: usize = 1024;
const TOKENS: usize = 64;
const RANK: usize = 16;
const F32: usize = 4;
const DENSE: usize = WIDTH * WIDTH * F32;
/// What a layer has to keep: its input, for dA, and `x·A`, for dB.
const ACTIVATIONS: usize = TOKENS * WIDTH * F32 + TOKENS * RANK * F32;
const OUTPUT: usize = TOKENS * WIDTH * F32;
const FACTORS: usize = 2 * WIDTH * RANK * F32;
const KIB: usize = 1024;

/// One test function: the allocator counts for the whole process.
#[test]
fn training_over_packed_weights_holds_no_dense_ones() {
    if !alone(training_over_packed_weights_holds_no_dense_ones) {
        return;
    }
    // Every thread has a scratch that stays, from its first share of a product on, which a busy machine may give it late.
    let before = ALLOCATOR.current_usage();
    measure(&packed(2), true, |layer, x| layer.forward(x));
    rayon::broadcast(|_| measure(&packed(2), true, |layer, x| layer.forward(x)));
    let stays = ALLOCATOR.current_usage() - before;
    let threads = rayon::current_num_threads();
    println!("{stays} bytes stay with {threads} threads");
    // This crate's and that of Burn's dense products.
    assert!(stays <= (threads + 1) * 2048 * KIB, "{stays}");

    for input_grad in [true, false] {
        let passes: Vec<Pass> = [8, 16, 32]
            .map(|layers| {
                let pass = measure(&packed(layers), input_grad, |layer, x| layer.forward(x));
                println!("packed, {layers} layers, input gradient {input_grad}: {pass:?}");
                let activations = layers * ACTIVATIONS + OUTPUT;
                assert!(
                    pass.kept <= activations + layers * 64 * KIB,
                    "{pass:?} against {activations}"
                );
                // A few tensors of an activation's size in flight; a dense weight would be four times as much.
                let scratch = 4 * OUTPUT + FACTORS;
                assert!(pass.forward_peak <= pass.kept + scratch, "{pass:?}");
                // Neither a dense weight nor a gradient of one.
                assert!(
                    pass.backward_peak <= pass.kept + layers * FACTORS + scratch,
                    "{pass:?}"
                );
                assert!(
                    pass.gradients <= layers * (FACTORS + 8 * KIB) + OUTPUT + 64 * KIB,
                    "{pass:?}"
                );
                pass
            })
            .into();
        for (few, many, layers) in [(0, 1, 8), (1, 2, 16)] {
            let growth = (passes[many].kept - passes[few].kept) / layers;
            assert!(growth <= ACTIVATIONS + DENSE / 20, "{growth} bytes a layer");
        }
    }

    packing_holds_one_dense_weight();
    an_embedding_and_its_head_are_never_composed();
    loading_holds_factors_once_on_either_side();

    // DoRA has an output more to keep, and its norms take no dense weight either.
    let dora = LoraConfig::new(RANK).with_dora(true);
    let pass = measure(&packed_with(&dora, 8), true, |layer, x| layer.forward(x));
    println!("DoRA, 8 layers: {pass:?}");
    assert!(pass.kept <= 8 * (ACTIVATIONS + OUTPUT + 64 * KIB) + OUTPUT);
    assert!(
        pass.forward_peak <= pass.kept + 4 * OUTPUT + 2 * FACTORS,
        "{pass:?}"
    );
    assert!(
        pass.backward_peak <= pass.kept + 8 * FACTORS + 5 * OUTPUT,
        "{pass:?}"
    );

    an_a_that_does_not_train_needs_no_input();

    // What the two ways of a whole model cost, for the documentation.
    let factored = measure_model(true);
    let composed = measure_model(false);
    println!(
        "8 layers of PeftModel: factored {factored:?}, composed by Linear::forward {composed:?}"
    );
    assert!(factored.kept <= 8 * (ACTIVATIONS + 64 * KIB) + OUTPUT);
    assert!(
        composed.kept >= 8 * DENSE,
        "the slow way keeps a dense weight a layer"
    );
}

/// LoRA-FA: with `A` frozen a layer keeps `x·A` alone, packed or dense, and the input of the first is the only one alive.
fn an_a_that_does_not_train_needs_no_input() {
    const LAYERS: usize = 16;
    /// What a node of the graph and its tensors' descriptions take; an input is 256 KiB.
    const NODE: usize = 16 * KIB;
    let frozen = LoraConfig::new(RANK).with_freeze_a(true);
    let needed = LAYERS * TOKENS * RANK * F32 + OUTPUT;
    let mut all = vec![(
        "packed",
        measure(&packed_with(&frozen, LAYERS), true, |layer, x| {
            layer.forward(x)
        }),
    )];
    let dense: Vec<LoraLinear> = (0..LAYERS)
        .map(|_| {
            let linear = LinearConfig::new(WIDTH, WIDTH).with_bias(false);
            LoraLinear::from_linear(linear.init(&Device::default().autodiff()), &frozen).unwrap()
        })
        .collect();
    // Burn's own product has a scratch that stays.
    measure(&dense, true, |layer, x| layer.forward(x));
    all.push(("dense", measure(&dense, true, |layer, x| layer.forward(x))));
    for (base, pass) in all {
        println!("A frozen, {LAYERS} {base} layers: {pass:?}");
        assert!(
            pass.kept <= needed + LAYERS * NODE,
            "{base}: {pass:?} against {needed}"
        );
        // The gradients of B, and that of the input.
        let gradients = LAYERS * (WIDTH * RANK * F32 + NODE) + OUTPUT;
        assert!(pass.gradients <= gradients + 64 * KIB, "{base}: {pass:?}");
    }
    // With `A` trained the inputs are there: what is measured is what is meant.
    let trained = measure(&packed(LAYERS), true, |layer, x| layer.forward(x));
    assert!(trained.kept >= LAYERS * TOKENS * WIDTH * F32, "{trained:?}");
}

/// Packing a model holds no second dense copy of a weight, and of weights not yet initialised one at a time.
/// An embedding with a LoRA that is the output head too: neither the changed embedding, nor its gradient, is there at any time.
fn an_embedding_and_its_head_are_never_composed() {
    const VOCABULARY: usize = 16384;
    const FEATURES: usize = 256;
    // As many as there are kernels for. With fewer Burn's own product of f32 copies what is transposed.
    const TOKENS: usize = 16;
    let device = Device::default().autodiff();
    let tokens = Tensor::<1, Int>::arange(0..TOKENS as i64, &device).mul_scalar(1000);
    let tokens: Tensor<2, Int> = tokens.unsqueeze();
    let passes = [false, true].map(|composed| {
        let embedding = EmbeddingConfig::new(VOCABULARY, FEATURES).init(&device);
        drop(embedding.weight.val());
        let mut model = PeftModel::new(Tied { embedding });
        let config = PeftConfig::new(LoraConfig::new(4), TargetConfig::list(["embedding"]));
        model.add_adapter("default", &config).unwrap();
        let embedding = &model.module().embedding;
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let logits = match composed {
            false => embedding.attend_peft(embedding.forward_peft(tokens.clone())),
            true => {
                let x = embedding.forward(tokens.clone());
                let head = embedding.weight.val().transpose();
                x.matmul(head.unsqueeze())
            }
        };
        let gradients = logits.sum().backward();
        let peak = ALLOCATOR.peak_usage() - before;
        drop(gradients);
        peak
    });
    println!("an embedding and its head: {passes:?} bytes at most");
    let (dense, logits) = (VOCABULARY * FEATURES * F32, TOKENS * VOCABULARY * F32);
    // Logits, their gradients and those of `A` in both places: a few of their sizes in flight.
    assert!(passes[0] <= 6 * logits, "{passes:?}");
    assert!(6 * logits < dense && dense < passes[1], "{passes:?}");
}

#[derive(Module, Debug)]
struct Tied {
    embedding: Embedding,
}

fn packing_holds_one_dense_weight() {
    const LAYERS: usize = 6;
    let device = Device::default();
    for initialised in [true, false] {
        let layers = (0..LAYERS).map(|_| {
            LinearConfig::new(WIDTH, WIDTH)
                .with_bias(false)
                .init(&device)
        });
        let stack = Stack {
            layers: layers.collect(),
        };
        if initialised {
            stack
                .layers
                .iter()
                .for_each(|layer| drop(layer.weight.val()));
        }
        let mut model = PeftModel::new(stack);
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let report = model
            .quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new())
            .unwrap();
        assert_eq!(report.weights, LAYERS);
        let peak = ALLOCATOR.peak_usage() - before;
        println!("packing {LAYERS} layers, initialised {initialised}: {peak} bytes at most");
        // Codes and scales once on the host and once in the model, and strips of a mebibyte.
        let packed = report.packed_bytes + 2 * report.packed_bytes / LAYERS + 3 * 1024 * KIB;
        // Burn's initialiser holds a weight twice while it draws one.
        let dense = if initialised { 0 } else { 2 * DENSE };
        assert!(peak <= dense + packed, "{peak} of {dense} and {packed}");
        let after = ALLOCATOR.current_usage() as isize - before as isize;
        let freed = if initialised {
            (LAYERS * DENSE) as isize
        } else {
            0
        };
        assert!(
            after <= report.packed_bytes as isize + 64 * KIB as isize - freed,
            "{after}"
        );
    }
}

/// Loading holds an adapter once as the file has it and once on the device, with one factor in between, and draws nothing at
/// random that the file would overwrite.
fn loading_holds_factors_once_on_either_side() {
    const RANK: usize = 256;
    const LAYERS: usize = 4;
    let device = Device::default();
    let stack = || {
        let layers = (0..LAYERS).map(|_| LinearConfig::new(WIDTH, WIDTH).init(&device));
        let stack = Stack {
            layers: layers.collect(),
        };
        stack
            .layers
            .iter()
            .for_each(|layer| drop(layer.weight.val()));
        PeftModel::new(stack)
    };
    let dir = tempfile::tempdir().unwrap();
    let mut saved = stack();
    let lora = LoraConfig::new(RANK).with_init(LoraInit::Random);
    let config = PeftConfig::new(lora, TargetConfig::all_linear());
    saved.add_adapter("default", &config).unwrap();
    let dir = saved
        .save_adapter("default", dir.path(), &SaveOptions::default())
        .unwrap();
    drop(saved);

    let mut model = stack();
    let drawn = || {
        let x = Tensor::<1>::random([8], Distribution::Default, &device);
        x.into_data().try_into_vec::<f32>().unwrap()
    };
    device.seed(7);
    let expected = drawn();
    device.seed(7);
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    model
        .load_adapter("default", &dir, &LoadOptions::default())
        .unwrap();
    let peak = ALLOCATOR.peak_usage() - before;
    assert_eq!(drawn(), expected, "the generator has not moved");
    let factor = WIDTH * RANK * F32;
    let factors = 2 * LAYERS * factor;
    println!("loading {factors} bytes of factors: {peak} at most");
    assert!(peak <= 2 * factors + factor + 256 * KIB, "{peak}");
    let after = ALLOCATOR.current_usage() - before;
    assert!(after <= factors + 64 * KIB, "{after}");
}

/// Bytes of one training pass, above those alive before it.
#[derive(Debug)]
struct Pass {
    /// Alive between forward and backward.
    kept: usize,
    forward_peak: usize,
    backward_peak: usize,
    /// Alive after the backward pass, with all gradients held.
    gradients: usize,
}

fn packed(layers: usize) -> Vec<QLoraLinear> {
    packed_with(&LoraConfig::new(RANK), layers)
}

fn packed_with(config: &LoraConfig, layers: usize) -> Vec<QLoraLinear> {
    let device = Device::default().autodiff();
    let layer = || {
        let linear = LinearConfig::new(WIDTH, WIDTH)
            .with_bias(true)
            .init(&device);
        let nf4 = Nf4Config::new().with_double_quant(true);
        QLoraLinear::from_linear(linear, &nf4, config).unwrap()
    };
    (0..layers).map(|_| layer()).collect()
}

fn measure<L>(
    layers: &[L],
    input_grad: bool,
    forward: impl Fn(&L, Tensor<2>) -> Tensor<2>,
) -> Pass {
    let device = Device::default().autodiff();
    let x = Tensor::<2>::random([TOKENS, WIDTH], Distribution::Default, &device);
    let x = if input_grad { x.require_grad() } else { x };
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let y = layers.iter().fold(x, |x, layer| forward(layer, x));
    let kept = ALLOCATOR.current_usage() - before;
    let forward_peak = ALLOCATOR.peak_usage() - before;
    ALLOCATOR.reset_peak_usage();
    let gradients = y.sum().backward();
    let backward_peak = ALLOCATOR.peak_usage() - before;
    let held = ALLOCATOR.current_usage().saturating_sub(before);
    drop(gradients);
    Pass {
        kept,
        forward_peak,
        backward_peak,
        gradients: held,
    }
}

#[derive(Module, Debug)]
struct Stack {
    layers: Vec<Linear>,
}

fn measure_model(factored: bool) -> Pass {
    let device = Device::default().autodiff();
    let layers = (0..8)
        .map(|_| LinearConfig::new(WIDTH, WIDTH).init(&device))
        .collect();
    let mut model = PeftModel::new(Stack { layers });
    model
        .quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new())
        .unwrap();
    let config = PeftConfig::new(LoraConfig::new(RANK), TargetConfig::all_linear());
    model.add_adapter("default", &config).unwrap();
    measure(&model.layers, true, |layer, x| match factored {
        true => layer.forward_peft(x),
        false => layer.forward(x),
    })
}
