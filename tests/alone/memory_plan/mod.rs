//! The memory plan against the allocator: the peak of live bytes of a training step, over a grid of setups.
//!
//! The grid is {full, LoRA, QLoRA} x {everything kept, blocks run again} x {64, 512 tokens} x {2048, 32000 of a vocabulary} of a
//! Llama of six blocks. The loss is that of all logits. No constant of the plan was fitted, on any part of the grid. What threads keep
//! as scratch from product to product is there before a model is built, and not counted.

mod step;

use crate::alone;
use burn_peft::memory::{
    Float, Head, Loss, Method, ModelShape, Optimizer, Plan, Recompute, Setup, Targets, plan,
};
use step::Measured;

/// What a prediction may be off by.
const OFF: f64 = 0.05;
/// What the allocator counts that is no tensor: modules, nodes of the graph, expressions of targets, descriptions of tensors.
/// Against it the smallest part of the smallest model, 18 MB in all, is compared.
const NO_TENSORS: f64 = 1e6;

/// So large that the peak is at the loss.
const LARGE_CHUNKS: Loss = Loss::Chunked {
    tokens: 512,
    vocab: 16_384,
};

const SMALL_CHUNKS: Loss = Loss::Chunked {
    tokens: 128,
    vocab: 4096,
};

/// One test function: the allocator counts for the whole process.
#[test]
fn predicted_peaks_are_those_of_the_allocator() {
    if !alone(predicted_peaks_are_those_of_the_allocator) {
        return;
    }
    let scratch = step::warm_up(&shape(64));
    let threads = rayon::current_num_threads();
    println!("{scratch} bytes of scratch stay with {threads} threads and this one");

    println!("method  blocks   seq  vocab |  predicted   measured  ratio | at");
    // Moments in f32 of what trains in bf16.
    for recompute in [Recompute::Never, Recompute::Segments(1)] {
        let full = Setup::new(Method::Full, Float::Bf16).with_recompute(recompute);
        compare(&shape(8192), &full.with_batch(1, 64));
        let qlora = Setup::new(Method::QLora, Float::Bf16).with_recompute(recompute);
        let narrow = qlora.clone().with_adapter(Float::Bf16);
        // Where little else is alive, what products with bf16 factors widen shows: see docs/memory.md.
        if recompute == Recompute::Never {
            compare(&shape(512), &narrow);
        }
        // A large rank, with which the optimiser's step counts.
        compare(&shape(512), &narrow.with_rank(256).with_batch(1, 16));
        for loss in [LARGE_CHUNKS, SMALL_CHUNKS] {
            compare(
                &shape(32_000),
                &qlora.clone().with_head(Head::Nf4).with_loss(loss),
            );
        }
    }
    for recompute in [Recompute::Never, Recompute::Segments(1)] {
        for vocab in [2048, 32000] {
            for seq in [64, 512] {
                for method in Method::ALL {
                    let setup = Setup::new(method, Float::F32)
                        .with_batch(1, seq)
                        .with_recompute(recompute);
                    compare(&shape(vocab), &setup);
                }
            }
        }
    }

    println!("without all logits: chunks of 128 tokens by 4096 of the vocabulary");
    for vocab in [2048, 32000] {
        for method in Method::ALL {
            let setup = Setup::new(method, Float::F32)
                .with_recompute(Recompute::Segments(1))
                .with_loss(SMALL_CHUNKS);
            compare(&shape(vocab), &setup);
        }
    }

    // The largest moment is that of the loss.
    let setup = Setup::new(Method::QLora, Float::F32).with_recompute(Recompute::Segments(1));
    compare(&shape(32_000), &setup.with_loss(LARGE_CHUNKS));

    println!("beyond the grid");
    for method in [Method::Lora, Method::QLora] {
        let setup = Setup::new(method, Float::Bf16);
        compare(&shape(32_000), &setup);
        let setup = setup.with_recompute(Recompute::Segments(1));
        compare(&shape(32_000), &setup.with_loss(LARGE_CHUNKS));
    }
    for method in Method::ALL {
        let setup = Setup::new(method, Float::F32).with_batch(1, 128);
        // A tied head, four sequences, two blocks a segment, few and small adapters.
        compare(&shape(8192).with_tied(true), &setup);
        compare(&shape(512), &setup.clone().with_batch(4, 64));
        compare(&shape(512), &setup.clone().with_batch(4, 70));
        let segments = Recompute::Segments(2);
        compare(&shape(512), &setup.clone().with_recompute(segments));
        for optimizer in [Optimizer::Sgd, Optimizer::AdamW8bit] {
            compare(&shape(512), &setup.clone().with_optimizer(optimizer));
        }
        let few = setup.with_targets(Targets::QUERY_VALUE).with_rank(4);
        compare(&shape(512), &few);
    }
}

fn shape(vocab: u64) -> ModelShape {
    ModelShape::new(vocab, 384, 1024, 6, 6, 2)
}

fn compare(shape: &ModelShape, setup: &Setup) {
    let plan = plan(shape, setup).unwrap();
    let measured = step::measure(shape, setup);
    let peak = plan.peak.parts.total() as f64;
    let ratio = peak / measured.peak;
    println!(
        "{:6} {:7} {:>5} {:6} | {:7.3} MB {:7.3} MB {ratio:.4} | {} ({}, {}{})",
        setup.method.name(),
        match setup.recompute {
            Recompute::Never => "kept".to_owned(),
            Recompute::Segments(n) => format!("again {n}"),
        },
        format!("{}x{}", setup.batch, setup.seq),
        shape.vocab,
        peak / 1e6,
        measured.peak / 1e6,
        plan.peak.moment,
        setup.base.name(),
        setup.optimizer.name(),
        if shape.tied { ", tied" } else { "" }
    );
    assert!((ratio - 1.0).abs() <= OFF, "{setup}: {plan}");
    compare_parts(&plan, &measured);
}

/// What stands, and what is kept between forward and backward.
fn compare_parts(plan: &Plan, measured: &Measured) {
    let standing = plan.weights + plan.scales + plan.adapters + plan.optimizer;
    // Of the bytes of logits and their gradient the first half is there by then; of chunks nothing stays.
    let logits = match plan.setup.loss {
        Loss::Logits => plan.logits / 2,
        Loss::Chunked { .. } => 0,
    };
    let kept = plan.activations + logits;
    for (name, predicted, measured) in [
        ("standing", standing, measured.standing),
        ("kept", kept, measured.kept),
    ] {
        let off = (predicted as f64 - measured).abs();
        assert!(
            off <= OFF * measured + NO_TENSORS,
            "{name}: {predicted} of {measured}, {}",
            plan.setup
        );
    }
}
