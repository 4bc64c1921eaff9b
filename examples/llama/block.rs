//! One block of a Llama: attention and a gated feed-forward network, each behind an RMS norm and a residual.
//!
//! `h = x + attn(norm(x))`, `y = h + W_down·(silu(W_gate·norm(h)) ⊙ W_up·norm(h))` (Shazeer, "GLU variants", 2020).

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};
use burn_peft::fused::{Visible, rms_norm, swiglu};
use burn_peft::model::PeftForward;

use super::attention::Attention;
use super::cache::KvCache;
use super::config::LlamaConfig;
use super::rope::Rotation;

/// The gated feed-forward network. Field names are Hugging Face's.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `hidden_size` to `intermediate_size`, through the activation.
    pub gate_proj: Linear,
    /// `hidden_size` to `intermediate_size`, gated.
    pub up_proj: Linear,
    /// `intermediate_size` to `hidden_size`.
    pub down_proj: Linear,
}

impl Mlp {
    /// Random weights on `device`, made when first used.
    pub fn new(config: &LlamaConfig, device: &Device) -> Self {
        let linear = |from: usize, to: usize| {
            LinearConfig::new(from, to)
                .with_bias(config.mlp_bias)
                .with_initializer(super::model::INITIALIZER)
                .init(device)
        };
        Self {
            gate_proj: linear(config.hidden_size, config.intermediate_size),
            up_proj: linear(config.hidden_size, config.intermediate_size),
            down_proj: linear(config.intermediate_size, config.hidden_size),
        }
    }

    /// `[batch, seq, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward_peft(x.clone());
        let up = self.up_proj.forward_peft(x);
        self.down_proj.forward_peft(swiglu(gate, up))
    }
}

/// One block. Field names are Hugging Face's.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before the attention.
    pub input_layernorm: RmsNorm,
    /// The attention.
    pub self_attn: Attention,
    /// Norm before the feed-forward network.
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward network.
    pub mlp: Mlp,
}

impl Block {
    /// Random weights on `device`, made when first used.
    pub fn new(config: &LlamaConfig, device: &Device) -> Self {
        let norm = RmsNormConfig::new(config.hidden_size).with_epsilon(config.rms_norm_eps);
        Self {
            input_layernorm: norm.init(device),
            self_attn: Attention::new(config, device),
            post_attention_layernorm: norm.init(device),
            mlp: Mlp::new(config, device),
        }
    }

    /// `[batch, seq, hidden_size]` to the same shape; arguments as [`Attention::forward`].
    pub fn forward(
        &self,
        x: Tensor<3>,
        rotation: &Rotation,
        visible: &Visible,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let attended = self.self_attn.forward(
            normed(&self.input_layernorm, x.clone()),
            rotation,
            visible,
            cache,
        );
        let h = x + attended;
        h.clone() + self.mlp.forward(normed(&self.post_attention_layernorm, h))
    }
}

/// A norm of Burn, through the fused operation.
pub fn normed(norm: &RmsNorm, x: Tensor<3>) -> Tensor<3> {
    rms_norm(x, norm.gamma.val(), norm.epsilon)
}
