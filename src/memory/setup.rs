//! How a model is trained: the method, its adapters, dtypes, optimiser, batch, and what is kept for backward.

use super::shape::{MAX_DIMENSION, ModelShape, Projection, in_range};
use crate::nf4::Nf4Config;
use crate::{PeftError, Result};

/// Floats of a weight, an activation or a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// Four bytes.
    F32,
    /// Two bytes.
    Bf16,
    /// Two bytes.
    F16,
}

impl Float {
    /// Bytes of a value.
    pub const fn bytes(self) -> u128 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// As it is usually written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// What is trained, and how the rest is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Every parameter.
    Full,
    /// Low-rank factors beside frozen dense weights.
    Lora,
    /// Low-rank factors beside frozen weights in NF4. Embedding, head and norms stay dense.
    QLora,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Full, Self::Lora, Self::QLora];

    /// As it is usually written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Lora => "LoRA",
            Self::QLora => "QLoRA",
        }
    }
}

/// Which linear layers have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets(u8);

impl Targets {
    /// q and v, the default of PEFT for a Llama.
    pub const QUERY_VALUE: Self = Self::of(&[Projection::Query, Projection::Value]);
    /// q, k, v and o.
    pub const ATTENTION: Self = Self::of(&[
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::Output,
    ]);
    /// gate, up and down.
    pub const MLP: Self = Self::of(&[Projection::Gate, Projection::Up, Projection::Down]);
    /// All seven of a block, and not the head, as PEFT's `all-linear`.
    pub const ALL_LINEAR: Self = Self(Self::ATTENTION.0 | Self::MLP.0);

    /// Exactly these.
    pub const fn of(projections: &[Projection]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < projections.len() {
            bits |= 1 << projections[index] as u8;
            index += 1;
        }
        Self(bits)
    }

    /// These and the head.
    pub const fn with_head(self) -> Self {
        Self(self.0 | Self::of(&[Projection::Head]).0)
    }

    /// Whether this layer is one of them.
    pub const fn contains(self, projection: Projection) -> bool {
        self.0 & (1 << projection as u8) != 0
    }
}

/// What an optimiser keeps of each trained value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimizer {
    /// Plain gradient descent: nothing.
    Sgd,
    /// Adam with decoupled weight decay: two moments, in f32 usually. Moments wider than what trains are those of
    /// `optim::F32State`, whose step widens the tensor it is at and its gradient.
    AdamW {
        /// The dtype of both moments.
        state: Float,
    },
    /// AdamW with both moments in one byte a value and an f32 for each block of 256, as bitsandbytes' `AdamW8bit`. Tensors
    /// of fewer than 4096 values keep f32.
    AdamW8bit,
}

impl Optimizer {
    /// As it is usually written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sgd => "SGD",
            Self::AdamW { state: Float::F32 } => "AdamW, f32",
            Self::AdamW { .. } => "AdamW, 16 bit",
            Self::AdamW8bit => "AdamW, 8 bit",
        }
    }
}

/// What stays of a block between forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Everything that its operations keep.
    Never,
    /// The input of each segment of so many blocks; the backward pass runs one segment at a time again
    /// ([`checkpointing`](crate::checkpointing)).
    Segments(u64),
}

/// How the head is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Dense, in this dtype. Of a tied model it is the embedding, whose dtype it has.
    Dense(Float),
    /// In NF4, by the same configuration as the blocks. Not with a tied embedding.
    Nf4,
}

/// How the loss is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// From all logits, `[tokens, V]`, which backward keeps, and their gradient.
    Logits,
    /// Head and loss over so many tokens and so much of the vocabulary at a time, forward and backward: never more logits
    /// than `tokens · vocab`, in f32.
    Chunked {
        /// Tokens at a time.
        tokens: u64,
        /// Logits of each at a time.
        vocab: u64,
    },
}

/// What the product of a linear layer copies while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// As on Burn's CPU backend: this crate's kernels copy nothing of a weight, but Burn's own product, which full fine-tuning and
    /// the forward pass of dense weights take, holds its result twice for a moment, in moving it to an address that is a multiple
    /// of a cache line, and multiplies 16 bits by widening both operands to f32.
    Cpu,
    /// Nothing.
    Direct,
    /// As on a backend that has no kernels for packed weights and fuses operations: one weight is dequantised whole, to the dtype of
    /// activations. Without fusion the operations hold up to 12 bytes per value of that weight, which the plan does not count.
    Dequantized,
}

/// A training setup. The fields may be set freely; [`plan`](super::plan) checks them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// What is trained.
    pub method: Method,
    /// Rank of the adapters. Of no effect for [`Method::Full`], as the targets and the adapters' dtype.
    pub rank: u64,
    /// Which layers have one.
    pub targets: Targets,
    /// Dtype of the adapters and of their gradients.
    pub adapter: Float,
    /// Dtype of dense weights of blocks and of norms, and of activations. With [`Method::Full`] also of gradients.
    pub base: Float,
    /// Dtype of the embedding. It is dense with every method: the crate packs linear layers, the head among them, and no embedding.
    pub embedding: Float,
    /// How the head is held. Its logits have its dtype, or that of activations.
    pub head: Head,
    /// Blocks and double quantisation, of [`Method::QLora`].
    pub nf4: Nf4Config,
    /// What keeps state.
    pub optimizer: Optimizer,
    /// Sequences in a step.
    pub batch: u64,
    /// Tokens in a sequence.
    pub seq: u64,
    /// What is kept of a block.
    pub recompute: Recompute,
    /// How the loss is computed.
    pub loss: Loss,
    /// What products copy while they run.
    pub products: Products,
}

impl Setup {
    /// Rank 8 on all linear layers of blocks, adapters and AdamW in f32, doubly quantised NF4; one sequence of 512 tokens,
    /// nothing computed again, plain logits. Everything else is in `base`.
    pub fn new(method: Method, base: Float) -> Self {
        Self {
            method,
            rank: 8,
            targets: Targets::ALL_LINEAR,
            adapter: Float::F32,
            base,
            embedding: base,
            head: Head::Dense(base),
            nf4: Nf4Config::new().with_double_quant(true),
            optimizer: Optimizer::AdamW { state: Float::F32 },
            batch: 1,
            seq: 512,
            recompute: Recompute::Never,
            loss: Loss::Logits,
            products: Products::Cpu,
        }
    }

    /// Sets the method.
    pub fn with_method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// Sets the rank.
    pub fn with_rank(mut self, rank: u64) -> Self {
        self.rank = rank;
        self
    }

    /// Sets which layers are adapted.
    pub fn with_targets(mut self, targets: Targets) -> Self {
        self.targets = targets;
        self
    }

    /// Sets the dtype of adapters.
    pub fn with_adapter(mut self, adapter: Float) -> Self {
        self.adapter = adapter;
        self
    }

    /// Sets the dtype of embedding and head.
    pub fn with_embeddings(mut self, dtype: Float) -> Self {
        self.embedding = dtype;
        self.head = Head::Dense(dtype);
        self
    }

    /// Sets how the head is held.
    pub fn with_head(mut self, head: Head) -> Self {
        self.head = head;
        self
    }

    /// Sets how weights are quantised.
    pub fn with_nf4(mut self, nf4: Nf4Config) -> Self {
        self.nf4 = nf4;
        self
    }

    /// Sets the optimiser.
    pub fn with_optimizer(mut self, optimizer: Optimizer) -> Self {
        self.optimizer = optimizer;
        self
    }

    /// Sets sequences in a step and tokens in each.
    pub fn with_batch(mut self, batch: u64, seq: u64) -> Self {
        (self.batch, self.seq) = (batch, seq);
        self
    }

    /// Sets what is kept of a block, and so what is computed again.
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.recompute = recompute;
        self
    }

    /// Sets how the loss is computed.
    pub fn with_loss(mut self, loss: Loss) -> Self {
        self.loss = loss;
        self
    }

    /// Sets what products copy.
    pub fn with_products(mut self, products: Products) -> Self {
        self.products = products;
        self
    }

    /// Whether a layer has an adapter.
    pub(super) fn adapts(&self, projection: Projection) -> bool {
        self.method != Method::Full && self.targets.contains(projection)
    }

    pub(super) fn check(&self, shape: &ModelShape) -> Result<()> {
        in_range("batch", self.batch, MAX_DIMENSION)?;
        in_range("seq", self.seq, MAX_DIMENSION)?;
        let wrong = |name: &str, value: String, expected: &str| {
            Err(PeftError::config(name, value, expected))
        };
        if self.method != Method::Full {
            in_range("rank", self.rank, MAX_DIMENSION)?;
            if self.targets == Targets(0) {
                return wrong("targets", "none".to_owned(), "one or more linear layers");
            }
        }
        if let Recompute::Segments(blocks) = self.recompute {
            in_range("blocks of a segment", blocks, MAX_DIMENSION)?;
        }
        if let Loss::Chunked { tokens, vocab } = self.loss {
            in_range("tokens of a chunk", tokens, MAX_DIMENSION)?;
            in_range("vocabulary of a chunk", vocab, MAX_DIMENSION)?;
        }
        match self.head {
            Head::Nf4 if self.method != Method::QLora => wrong(
                "head",
                "NF4".to_owned(),
                "a dense head, unless the method is QLoRA",
            ),
            Head::Nf4 if shape.tied => wrong(
                "head",
                "NF4".to_owned(),
                "a dense head, as it is tied to the embedding",
            ),
            Head::Dense(dtype) if shape.tied && dtype != self.embedding => wrong(
                "head",
                dtype.name().to_owned(),
                "the dtype of the embedding that it is tied to",
            ),
            _ if shape.tied && self.adapts(Projection::Head) => wrong(
                "targets",
                "head".to_owned(),
                "no head, as it is tied to the embedding",
            ),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_what_they_say() {
        let all = Targets::ALL_LINEAR.with_head();
        for projection in Projection::BLOCK {
            assert!(all.contains(projection) && Targets::ALL_LINEAR.contains(projection));
            let attention = Targets::ATTENTION.contains(projection);
            assert_eq!(attention, !Targets::MLP.contains(projection));
        }
        assert!(all.contains(Projection::Head) && !Targets::ALL_LINEAR.contains(Projection::Head));
        assert!(!Targets::QUERY_VALUE.contains(Projection::Key));
    }

    #[test]
    fn an_impossible_setup_is_named() {
        let setup = || Setup::new(Method::QLora, Float::Bf16);
        let error = |setup: Setup, tied: bool| {
            let shape = ModelShape::llama3_8b().with_tied(tied);
            setup.check(&shape).unwrap_err().to_string()
        };
        let chunked = Loss::Chunked {
            tokens: 8,
            vocab: 0,
        };
        for (error, names) in [
            (error(setup().with_rank(0), false), "rank = 0"),
            (
                error(setup().with_rank(u64::MAX), false),
                "rank = 18446744073709551615",
            ),
            (error(setup().with_batch(0, 1), false), "batch = 0"),
            (
                error(setup().with_batch(1, 1 << 60), false),
                "seq = 1152921504606846976",
            ),
            (
                error(setup().with_targets(Targets::of(&[])), false),
                "targets = none",
            ),
            (
                error(setup().with_loss(chunked), false),
                "vocabulary of a chunk = 0",
            ),
            (error(setup().with_head(Head::Nf4), true), "head = NF4"),
            (
                error(
                    setup().with_head(Head::Nf4).with_method(Method::Lora),
                    false,
                ),
                "head = NF4",
            ),
            (
                error(setup().with_head(Head::Dense(Float::F32)), true),
                "head = f32",
            ),
            (
                error(setup().with_targets(Targets::QUERY_VALUE.with_head()), true),
                "targets = head",
            ),
        ] {
            assert!(error.contains(names), "{error}");
        }
        // A rank means nothing where nothing is adapted.
        let full = setup().with_method(Method::Full).with_rank(0);
        assert!(full.check(&ModelShape::llama3_8b()).is_ok());
    }
}
