//! The shape of a decoder-only transformer: everything that decides how many bytes a run needs, and nothing else.
//!
//! With `V` tokens, width `h`, `L` blocks, `a` query heads and `g` heads of keys and values of width `d`, and a gated
//! feed-forward network of width `f`, the parameters are
//!
//! ```text
//! P = V·h·(1 or 2) + L·(h·a·d + 2·h·g·d + a·d·h + 3·h·f + biases + 2·h) + h
//! ```
//!
//! with two embeddings unless the head is tied. Source: A. Touvron et al., "Llama", <https://arxiv.org/abs/2302.13971>; grouped
//! queries: J. Ainslie et al., <https://arxiv.org/abs/2305.13245>.

use crate::{PeftError, Result};

/// Most that a dimension of a model may be: 2²⁴. With [`MAX_LAYERS`] no sum of bytes comes near 2¹²⁸.
pub const MAX_DIMENSION: u64 = 1 << 24;
/// Most blocks that a model may have.
pub const MAX_LAYERS: u64 = 1 << 12;

/// The shape of a decoder-only transformer of the Llama family.
///
/// Fields may be set freely; whatever uses a shape checks it first ([`check`](Self::check)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Number of tokens, `V`.
    pub vocab: u64,
    /// Width of the residual stream, `h`.
    pub hidden: u64,
    /// Width inside the feed-forward network, `f`.
    pub intermediate: u64,
    /// Number of blocks, `L`.
    pub layers: u64,
    /// Query heads, `a`.
    pub heads: u64,
    /// Heads of keys and values, `g`; divides `heads`.
    pub kv_heads: u64,
    /// Width of a head, `d`; even, for the rotary embedding.
    pub head_dim: u64,
    /// Whether the head is the transposed embedding.
    pub tied: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether o has one.
    pub output_bias: bool,
    /// Whether gate, up and down have one.
    pub mlp_bias: bool,
}

/// One linear layer of a block, or the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projection {
    /// Queries, `h -> a·d`.
    Query,
    /// Keys, `h -> g·d`.
    Key,
    /// Values, `h -> g·d`.
    Value,
    /// The attention's output, `a·d -> h`.
    Output,
    /// The gate of the feed-forward network, `h -> f`.
    Gate,
    /// What is gated, `h -> f`.
    Up,
    /// Back, `f -> h`.
    Down,
    /// The head, `h -> V`.
    Head,
}

impl Projection {
    /// Those of a block, in the order in which a model has them.
    pub const BLOCK: [Self; 7] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];
}

impl ModelShape {
    /// Llama 3 of 8 billion parameters: 8 030 261 248.
    pub fn llama3_8b() -> Self {
        Self::new(128_256, 4096, 14_336, 32, 32, 8)
    }

    /// Llama 3 of 70 billion parameters: 70 553 706 496.
    pub fn llama3_70b() -> Self {
        Self::new(128_256, 8192, 28_672, 80, 64, 8)
    }

    /// SmolLM2 of 135 million parameters, head tied: 134 515 008.
    pub fn smollm2_135m() -> Self {
        Self::new(49_152, 576, 1536, 30, 9, 3).with_tied(true)
    }

    /// A shape without biases, with a head of its own and heads of width `hidden / heads`.
    pub fn new(
        vocab: u64,
        hidden: u64,
        intermediate: u64,
        layers: u64,
        heads: u64,
        kv_heads: u64,
    ) -> Self {
        Self {
            vocab,
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim: hidden.checked_div(heads).unwrap_or(0),
            tied: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
        }
    }

    /// Sets whether the head is the transposed embedding.
    pub fn with_tied(mut self, tied: bool) -> Self {
        self.tied = tied;
        self
    }

    /// Sets the number of blocks: what a run with some layers of a larger model needs, at its whole width.
    pub fn with_layers(mut self, layers: u64) -> Self {
        self.layers = layers;
        self
    }

    /// That no dimension is zero or over its limit, that the heads divide, and that their width is even.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] with the field, as `config.json` calls it, its value and what is expected.
    pub fn check(&self) -> Result<()> {
        for (name, value, limit) in [
            ("vocab_size", self.vocab, MAX_DIMENSION),
            ("hidden_size", self.hidden, MAX_DIMENSION),
            ("intermediate_size", self.intermediate, MAX_DIMENSION),
            ("num_hidden_layers", self.layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, MAX_DIMENSION),
            ("num_key_value_heads", self.kv_heads, MAX_DIMENSION),
            ("head_dim", self.head_dim, MAX_DIMENSION),
        ] {
            in_range(name, value, limit)?;
        }
        let wrong = |name: &str, value: u64, expected: String| {
            Err(PeftError::config(name, value, expected))
        };
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {}", self.heads);
            return wrong("num_key_value_heads", self.kv_heads, expected);
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong("head_dim", self.head_dim, "an even number".to_owned());
        }
        for (name, heads) in [
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
        ] {
            if heads * self.head_dim > MAX_DIMENSION {
                let expected = format!(
                    "at most {MAX_DIMENSION} with head_dim = {} times it",
                    self.head_dim
                );
                return wrong(name, heads, expected);
            }
        }
        Ok(())
    }

    /// `[d_in, d_out]` of a linear layer.
    pub fn dims(&self, projection: Projection) -> [u64; 2] {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match projection {
            Projection::Query => [self.hidden, queries],
            Projection::Key | Projection::Value => [self.hidden, keys],
            Projection::Output => [queries, self.hidden],
            Projection::Gate | Projection::Up => [self.hidden, self.intermediate],
            Projection::Down => [self.intermediate, self.hidden],
            Projection::Head => [self.hidden, self.vocab],
        }
    }

    /// Whether a linear layer has a bias.
    pub fn has_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Query | Projection::Key | Projection::Value => self.qkv_bias,
            Projection::Output => self.output_bias,
            Projection::Gate | Projection::Up | Projection::Down => self.mlp_bias,
            Projection::Head => false,
        }
    }

    /// The number of parameters; a tied head counts once.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn parameters(&self) -> Result<u128> {
        self.check()?;
        let linear = |&projection: &Projection| {
            let [d_in, d_out] = self.dims(projection).map(u128::from);
            d_in * d_out + d_out * u128::from(self.has_bias(projection))
        };
        let [vocab, hidden] = [self.vocab, self.hidden].map(u128::from);
        let block = Projection::BLOCK.iter().map(linear).sum::<u128>() + 2 * hidden;
        let embeddings = if self.tied { 1 } else { 2 };
        Ok(embeddings * vocab * hidden + u128::from(self.layers) * block + hidden)
    }
}

/// That a number is at least one and at most `limit`.
pub(super) fn in_range(name: &str, value: u64, limit: u64) -> Result<()> {
    if (1..=limit).contains(&value) {
        return Ok(());
    }
    Err(PeftError::config(name, value, format!("1 to {limit}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_published_models() {
        let count = |shape: ModelShape| shape.parameters().unwrap();
        // 2·128256·4096 + 32·(2·4096² + 2·4096·1024 + 3·4096·14336 + 2·4096) + 4096
        assert_eq!(count(ModelShape::llama3_8b()), 8_030_261_248);
        // 2·128256·8192 + 80·(2·8192² + 2·8192·1024 + 3·8192·28672 + 2·8192) + 8192
        assert_eq!(count(ModelShape::llama3_70b()), 70_553_706_496);
        // 49152·576 + 30·(2·576² + 2·576·192 + 3·576·1536 + 2·576) + 576
        assert_eq!(count(ModelShape::smollm2_135m()), 134_515_008);
        // The 8B with 8 of its blocks: 24 · 218 112 000 fewer.
        let block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096;
        assert_eq!(block, 218_112_000);
        assert_eq!(
            count(ModelShape::llama3_8b().with_layers(8)),
            8_030_261_248 - 24 * block
        );
    }

    #[test]
    fn biases_count() {
        let plain = ModelShape::new(10, 8, 16, 1, 2, 1);
        let mut biased = plain.clone();
        (biased.qkv_bias, biased.output_bias, biased.mlp_bias) = (true, true, true);
        let more = biased.parameters().unwrap() - plain.parameters().unwrap();
        assert_eq!(more, (8 + 4 + 4) + 8 + (16 + 16 + 8));
    }

    #[test]
    fn a_shape_that_cannot_be_is_an_error_that_names_the_field() {
        let shape = ModelShape::llama3_8b;
        let with = |change: fn(&mut ModelShape)| {
            let mut shape = shape();
            change(&mut shape);
            shape.parameters().unwrap_err().to_string()
        };
        for (error, names) in [
            (with(|s| s.vocab = 0), "vocab_size = 0"),
            (
                with(|s| s.hidden = u64::MAX),
                "hidden_size = 18446744073709551615",
            ),
            (with(|s| s.layers = 4097), "num_hidden_layers = 4097"),
            (with(|s| s.kv_heads = 5), "num_key_value_heads = 5"),
            (with(|s| s.head_dim = 127), "head_dim = 127"),
            (
                with(|s| (s.heads, s.kv_heads, s.head_dim) = (1 << 24, 1, 1 << 24)),
                "num_attention_heads",
            ),
        ] {
            assert!(error.contains(names), "{error}");
        }
        assert!(ModelShape::new(8, 8, 8, 1, 0, 0).check().is_err());
    }

    #[test]
    fn the_largest_shape_does_not_overflow() {
        let most = ModelShape {
            head_dim: 2,
            ..ModelShape::new(1 << 24, 1 << 24, 1 << 24, 1 << 12, 1 << 23, 1 << 23)
        };
        // 2^25·2^24 of embeddings and 2^12 blocks of 7·2^48 and 2^25, and a norm.
        let (one, block) = (1u128, 7 * (1u128 << 48) + (1 << 25));
        assert_eq!(
            most.parameters().unwrap(),
            (one << 49) + (one << 12) * block + (1 << 24)
        );
    }
}
