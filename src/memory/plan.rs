//! What a training run will need, part by part, and when it needs most.

use super::ledger::{Ledger, Part, Peak};
use super::setup::Setup;
use super::shape::ModelShape;
use super::step::Step;
use super::tensors::{standing, trained};
use crate::Result;

/// The bytes of a training run.
///
/// `Display` prints a table of it; [`table`](super::table) puts several side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The model.
    pub shape: ModelShape,
    /// The setup.
    pub setup: Setup,
    /// Parameters of the model.
    pub parameters: u128,
    /// Parameters that train.
    pub trainable: u128,
    /// Dense weights, and codes of packed ones.
    pub weights: u128,
    /// Scales of packed weights.
    pub scales: u128,
    /// Factors of adapters.
    pub adapters: u128,
    /// Gradients of all that trains. They are all alive only when backward has ended.
    pub gradients: u128,
    /// The optimiser's state.
    pub optimizer: u128,
    /// What the forward pass keeps for backward, logits not counted.
    pub activations: u128,
    /// The largest single tensor that lives within one pass only, logits not counted.
    pub largest_transient: u128,
    /// The most of logits and their gradient at once.
    pub logits: u128,
    /// The most that is alive at once in a step that has the optimiser's state, when, and of what it is made.
    pub peak: Peak,
}

/// What a run of `setup` on a model of this shape needs.
///
/// The step is run with sizes in the place of tensors, operation by operation. So the peak is that of tensors; what threads keep
/// as scratch, a few mebibytes each, and the program itself come on top.
///
/// # Errors
///
/// [`PeftError::Config`](crate::PeftError::Config), which names the option, for a shape that cannot be, a number that is zero
/// or over its limit, and options that exclude each other.
pub fn plan(shape: &ModelShape, setup: &Setup) -> Result<Plan> {
    let parameters = shape.parameters()?;
    setup.check(shape)?;
    let ledger = Ledger::new();
    let parts = standing(shape, setup);
    let _standing = [Part::Weights, Part::Scales, Part::Adapters, Part::Optimizer]
        .map(|part| ledger.tensor(part, parts.of(part)));
    let activations = Step::new(shape, setup, ledger.clone()).run();
    let trained = trained(shape, setup);
    Ok(Plan {
        shape: shape.clone(),
        setup: setup.clone(),
        parameters,
        trainable: trained.iter().map(|(_, values)| values).sum(),
        weights: parts.of(Part::Weights),
        scales: parts.of(Part::Scales),
        adapters: parts.of(Part::Adapters),
        gradients: ledger.most().of(Part::Gradients),
        optimizer: parts.of(Part::Optimizer),
        activations,
        largest_transient: ledger.largest_transient(),
        logits: ledger.most().of(Part::Logits),
        peak: ledger.peak(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::setup::{Float, Head, Loss, Method, Optimizer, Products, Recompute};
    use super::super::shape::{MAX_DIMENSION, MAX_LAYERS};
    use super::*;
    use crate::PeftError;

    const LOSSES: [Loss; 2] = [
        Loss::Logits,
        Loss::Chunked {
            tokens: MAX_DIMENSION,
            vocab: MAX_DIMENSION,
        },
    ];

    /// Every combination of the options that decide what code runs.
    fn all_setups(tied: bool) -> Vec<Setup> {
        let mut setups = Vec::new();
        for method in Method::ALL {
            for recompute in [1, 3, MAX_DIMENSION].map(Recompute::Segments) {
                for products in [Products::Cpu, Products::Direct, Products::Dequantized] {
                    for loss in LOSSES {
                        let setup = Setup::new(method, Float::Bf16)
                            .with_products(products)
                            .with_loss(loss);
                        setups.push(setup.clone());
                        let setup = setup.with_recompute(recompute);
                        setups.push(setup.clone().with_optimizer(Optimizer::AdamW8bit));
                        if method == Method::QLora && !tied {
                            setups.push(setup.with_head(Head::Nf4));
                        }
                    }
                }
            }
        }
        setups
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let most = MAX_DIMENSION;
        for tied in [false, true] {
            let shape = ModelShape {
                head_dim: 2,
                ..ModelShape::new(most, most, most, 2, most / 2, most / 2).with_tied(tied)
            };
            for setup in all_setups(tied) {
                let setup = setup.with_batch(most, most).with_rank(most);
                let plan = plan(&shape, &setup).unwrap();
                assert!(plan.peak.parts.total() > 1 << 70, "{setup}");
                assert!(!plan.to_string().is_empty());
            }
        }
        let deep = ModelShape::new(most, most, most, MAX_LAYERS, 1 << 12, 1 << 12);
        assert!(plan(&deep, &Setup::new(Method::Full, Float::F32)).is_ok());
    }

    #[test]
    fn a_plan_adds_up_in_every_setup() {
        for tied in [false, true] {
            let shape = ModelShape::new(64, 32, 48, 5, 4, 2).with_tied(tied);
            for setup in all_setups(tied) {
                let plan = plan(&shape, &setup.with_batch(2, 16)).unwrap();
                let standing = plan.weights + plan.scales + plan.adapters + plan.optimizer;
                let peak = plan.peak.parts;
                // What stands is there at the peak too.
                for (part, bytes) in [
                    (Part::Weights, plan.weights),
                    (Part::Scales, plan.scales),
                    (Part::Adapters, plan.adapters),
                    (Part::Optimizer, plan.optimizer),
                ] {
                    assert_eq!(peak.of(part), bytes, "{plan}");
                }
                // All gradients are alive at the end of backward.
                assert!(peak.total() >= standing + plan.gradients, "{plan}");
                assert!(peak.total() >= standing + plan.activations, "{plan}");
                assert!(plan.gradients >= 2 * plan.trainable, "{plan}");
                assert!(plan.logits > 0 && plan.largest_transient > 0);
            }
        }
    }

    #[test]
    fn what_is_impossible_is_an_error() {
        let setup = Setup::new(Method::Lora, Float::Bf16);
        let shape = ModelShape::llama3_8b;
        for (shape, setup) in [
            (shape().with_layers(0), setup.clone()),
            (shape(), setup.clone().with_rank(0)),
            (shape(), setup.clone().with_batch(u64::MAX, 1)),
            (shape(), setup.with_recompute(Recompute::Segments(0))),
        ] {
            let error = plan(&shape, &setup).unwrap_err();
            assert!(matches!(error, PeftError::Config { .. }), "{error}");
        }
    }
}
