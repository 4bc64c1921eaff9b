//! Dense compositions: what a model does where a layer reads a changed weight by `val()`.
//!
//! Burn's own layers read the value of a parameter, so an adapted or packed weight must be composed for them: `W + s·A·B`, dense,
//! in every forward pass. Two things cannot be composed: dropout acts on the input of an adapter, and a bias of `B` is added to
//! the output. A weight has neither.

use burn::module::Module;
use burn::tensor::Device;

use super::peft_model::PeftModel;
use super::weight::PeftWeight;

/// What a model allows where a layer of Burn's own composes a dense weight.
///
/// By default a weight is composed, but not if that would leave something out: dropout that would act now, or a bias of `B`. Both
/// are panics that name the weight and the way out, since Burn's `forward` has no other way to fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ComposeOptions {
    /// Whether every composition is refused: to find the call sites that lack
    /// [`forward_peft`](super::PeftForward::forward_peft). Default: false.
    pub deny: bool,
    /// Whether a weight may be composed without the dropout of its adapters, which then train without it. Default: false.
    pub allow_without_dropout: bool,
    /// Whether a weight may be composed without the bias of `B` of its adapters, whose outputs then lack it. Default: false.
    pub allow_without_bias: bool,
}

impl ComposeOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuses every composition, or none.
    pub fn with_deny(mut self, deny: bool) -> Self {
        self.deny = deny;
        self
    }

    /// Lets weights be composed without the dropout of their adapters.
    pub fn with_allow_without_dropout(mut self, allow: bool) -> Self {
        self.allow_without_dropout = allow;
        self
    }

    /// Lets weights be composed without the bias of `B` of their adapters.
    pub fn with_allow_without_bias(mut self, allow: bool) -> Self {
        self.allow_without_bias = allow;
        self
    }
}

impl<M: Module> PeftModel<M> {
    /// Refuses dense compositions from now on: a layer that is called by Burn's `forward`, where
    /// [`forward_peft`](super::PeftForward::forward_peft) would compute factored and packed, panics with the path of its weight.
    ///
    /// What has no other way stays allowed: tensors of experts, copies of whole parameters, and what this crate composes itself
    /// where it is called (DoRA in [`attend_peft`](super::TiedHead::attend_peft) and in the loss of a head).
    /// [`set_compose_options`](Self::set_compose_options) takes it back.
    pub fn deny_composed(&mut self) {
        let options = self.compose.with_deny(true);
        self.set_compose_options(options);
    }

    /// Says what is allowed where a layer composes a dense weight. Clones keep their own options.
    pub fn set_compose_options(&mut self, options: ComposeOptions) {
        self.compose = options;
        self.change(|state| state.compose = options);
    }

    /// A clone with other options, for one call or for as long as it is kept. Tensors are shared.
    pub fn with_compose_options(&self, options: ComposeOptions) -> Self {
        let mut clone = self.clone();
        clone.set_compose_options(options);
        clone
    }

    /// What is allowed where a layer composes a dense weight.
    pub fn compose_options(&self) -> ComposeOptions {
        self.compose
    }
}

impl PeftWeight {
    /// Refuses a composition that the options do not allow.
    ///
    /// # Panics
    ///
    /// In that case, with the path of the weight and the way out.
    pub(super) fn check_composed(&self, dims: &[usize], device: &Device) {
        let path = &self.path;
        let biased = || self.name_of(|lora| lora.bias.is_some());
        if !self.compose.allow_without_bias
            && let Some(name) = biased()
        {
            panic!(
                "`{path}`: adapter `{name}` has a bias of B, which is no part of a weight, and the layer composes the weight: call \
                 `forward_peft` in place of `forward` where the layer is called, or leave the bias out by \
                 `ComposeOptions::allow_without_bias`"
            );
        }
        assert!(
            !self.mixes_groups(dims),
            "`{path}`: an adapter of it sees the channels of all groups of the convolution, which is no change of its weight: call \
             `forward_peft` in place of `forward` where the layer is called"
        );
        let drops = || {
            self.name_of(|lora| {
                let acts = lora.dropout.prob > 0.0 && lora.dropout.training.is_enabled();
                acts && device.is_autodiff()
            })
        };
        if !self.compose.allow_without_dropout
            && !self.looks_up
            && let Some(name) = drops()
        {
            panic!(
                "`{path}`: adapter `{name}` has dropout on its input, which a composed weight does not have: call `forward_peft` in \
                 place of `forward` where the layer is called, set the adapter's dropout to 0, or train without it by \
                 `ComposeOptions::allow_without_dropout`"
            );
        }
        assert!(
            !self.compose.deny || !self.is_composed(),
            "`{path}`: the layer is called by `forward`, which composes the dense weight, and `deny_composed` refuses that: call \
             `forward_peft` in place of `forward` where the layer is called"
        );
    }
}
