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
