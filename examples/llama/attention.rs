//! Causal grouped-query attention with a key-value cache.
//!
//! `softmax(Q·Kᵀ/√d + mask)·V`, where `heads / kv_heads` query heads share one key and value head (Ainslie et al.,
//! "GQA", 2023).

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::dataset::PackedBatch;
use burn_peft::fused::{Visible, attention};
use burn_peft::model::PeftForward;

use super::cache::KvCache;
use super::config::LlamaConfig;
use super::rope::Rotation;

/// Where each token stands and which earlier ones it does not see.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Positions for the rotary embedding, `[batch or 1, seq]`.
    pub positions: Tensor<2, Int>,
    /// What each query sees.
    pub visible: Visible,
}

impl Layout {
    /// `seq` tokens that follow `past` cached ones, the same for every row of the batch.
    ///
    /// Right padding needs nothing more: no real token sees what stands to its right.
    pub fn causal(seq: usize, past: usize, device: &Device) -> Self {
        Self::left_padded(&[0], seq, past, device)
    }

    /// As [`causal`](Self::causal), but row `b` begins with `padding[b]` tokens that nothing sees and that do not
    /// count as positions.
    pub fn left_padded(padding: &[usize], seq: usize, past: usize, device: &Device) -> Self {
        let row = |&pad: &usize| (past..past + seq).map(move |query| query.saturating_sub(pad));
        let positions: Vec<_> = padding.iter().flat_map(row).map(|at| at as i64).collect();
        let shape = [padding.len(), seq];
        Self {
            positions: Tensor::from_data(TensorData::new(positions, shape), device),
            visible: Visible::left_padded(padding, seq, past),
        }
    }

    /// The tokens of a packed batch: each sees those of its own segment up to itself, and counts from the segment's first.
    pub fn packed(batch: &PackedBatch, device: &Device) -> Self {
        Self {
            positions: batch.positions_on(device),
            visible: batch.visible(),
        }
    }
}

/// The attention of one block. Field names are Hugging Face's.
#[derive(Module, Debug)]
pub struct Attention {
    /// `hidden_size` to `num_attention_heads · head_dim`.
    pub q_proj: Linear,
    /// `hidden_size` to `num_key_value_heads · head_dim`.
    pub k_proj: Linear,
    /// `hidden_size` to `num_key_value_heads · head_dim`.
    pub v_proj: Linear,
    /// `num_attention_heads · head_dim` to `hidden_size`.
    pub o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    /// Random weights on `device`, made when first used.
    pub fn new(config: &LlamaConfig, device: &Device) -> Self {
        let linear = |from: usize, to: usize| {
            LinearConfig::new(from, to)
                .with_bias(config.attention_bias)
                .with_initializer(super::model::INITIALIZER)
                .init(device)
        };
        let (heads, kv_heads, head_dim) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        );
        Self {
            q_proj: linear(config.hidden_size, heads * head_dim),
            k_proj: linear(config.hidden_size, kv_heads * head_dim),
            v_proj: linear(config.hidden_size, kv_heads * head_dim),
            o_proj: linear(heads * head_dim, config.hidden_size),
            heads,
            kv_heads,
            head_dim,
        }
    }

    /// `[batch, seq, hidden_size]` to the same shape; `cache` is the whole model's cache and this layer's index in it.
    pub fn forward(
        &self,
        x: Tensor<3>,
        rotation: &Rotation,
        visible: &Visible,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let split = |x: Tensor<3>, heads| {
            x.reshape([batch, seq, heads, self.head_dim])
                .swap_dims(1, 2)
        };
        let q = rotation.apply(split(self.q_proj.forward_peft(x.clone()), self.heads));
        let k = rotation.apply(split(self.k_proj.forward_peft(x.clone()), self.kv_heads));
        let v = split(self.v_proj.forward_peft(x), self.kv_heads);
        let (k, v) = match cache {
            Some((cache, layer)) => cache.append(layer, k, v),
            None => (k, v),
        };
        let y = attention(q, k, v, visible, 1.0 / (self.head_dim as f64).sqrt());
        self.o_proj.forward_peft(y.swap_dims(1, 2).reshape([
            batch,
            seq,
            self.heads * self.head_dim,
        ]))
    }
}
