//! Options of the policy loss, and the published combinations of them.

use super::{KlEstimator, Surrogate};
use crate::{PeftError, Result};

/// What a probability ratio is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// `ρ_t = e^(ℓ_t − ℓ^old_t)`, one for each token.
    #[default]
    Token,
    /// `ρ = e^((L − L^old)/n)`, one for each sequence, by token ([GSPO](https://arxiv.org/abs/2507.18071)).
    Sequence,
    /// `ρ = e^(L − L^old)`, one for each sequence: the ratio of the completions' probabilities (RLOO).
    SequenceSum,
}

/// How the terms of tokens become one number: this decides the count that divides the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aggregate {
    /// The mean over tokens; the count is that of tokens. Divided by those of the whole step it is DAPO's, by those of a micro-batch BNPO's.
    #[default]
    TokenMean,
    /// The mean over sequences of their token means; the count is that of sequences (GRPO).
    SequenceMean,
    /// The mean over sequences of their sums; the count is that of sequences (LUSPO).
    SequenceSum,
    /// The sum by this many tokens for every sequence, the most that a completion may have: no sequence's weight depends on its length.
    /// The count is sequences times this (Dr. GRPO).
    Constant(usize),
}

/// The divergence from a reference in the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlPenalty {
    /// β, at least 0.
    pub coef: f64,
    /// The estimator.
    pub estimator: KlEstimator,
    /// Whether it is multiplied by the ratio ρ, with its gradient: only then does the loss of `K3` descend `KL(π‖π_ref)`, also on samples
    /// of an older policy.
    pub corrected: bool,
}

impl KlPenalty {
    /// `β·ρ·k3`.
    pub fn new(coef: f64) -> Self {
        Self {
            coef,
            estimator: KlEstimator::K3,
            corrected: true,
        }
    }

    /// With another estimator.
    pub fn with_estimator(mut self, estimator: KlEstimator) -> Self {
        self.estimator = estimator;
        self
    }

    /// With or without the ratio.
    pub fn with_corrected(mut self, corrected: bool) -> Self {
        self.corrected = corrected;
        self
    }
}

/// Options of [`policy_loss`](super::policy_loss). The default is [`dapo`](Self::dapo) with symmetric bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicyConfig {
    /// The term of a token.
    pub surrogate: Surrogate,
    /// What the ratio is of.
    pub level: Level,
    /// How the terms become one number.
    pub aggregate: Aggregate,
    /// The divergence from a reference; none is none.
    pub kl: Option<KlPenalty>,
    /// c, the weight of the entropy, which is taken off the loss: a mean over tokens.
    pub entropy_coef: f64,
}

impl PolicyConfig {
    /// The clipped surrogate (ε = 0.2), the mean over the tokens of the step.
    pub fn new() -> Self {
        Self::default()
    }

    /// [PPO](https://arxiv.org/abs/1707.06347): clipped at ε, the mean over tokens.
    pub fn ppo(clip: f64) -> Self {
        Self::new().with_surrogate(Surrogate::clip(clip, clip))
    }

    /// [GRPO](https://arxiv.org/abs/2402.03300): ε = 0.2, the mean over sequences of token means.
    pub fn grpo() -> Self {
        Self::new().with_aggregate(Aggregate::SequenceMean)
    }

    /// [DAPO](https://arxiv.org/abs/2503.14476): ε = 0.2 below and 0.28 above, the mean over the tokens of the step.
    pub fn dapo() -> Self {
        Self::new().with_surrogate(Surrogate::clip(0.2, 0.28))
    }

    /// [Dr. GRPO](https://arxiv.org/abs/2503.20783), for completions of at most this many tokens. Its advantages have
    /// [`Scale::None`](super::Scale::None).
    pub fn dr_grpo(max_completion: usize) -> Self {
        Self::new().with_aggregate(Aggregate::Constant(max_completion))
    }

    /// [GSPO](https://arxiv.org/abs/2507.18071): ratios of sequences by token, ε = 3e-4 below and 4e-4 above.
    pub fn gspo() -> Self {
        Self::grpo()
            .with_surrogate(Surrogate::clip(3e-4, 4e-4))
            .with_level(Level::Sequence)
    }

    /// [CISPO](https://arxiv.org/abs/2506.13585): the ratio is a weight of at most 5, without gradient.
    pub fn cispo() -> Self {
        Self::new().with_surrogate(Surrogate::Cispo { max: 5.0 })
    }

    /// [SAPO](https://arxiv.org/abs/2511.20347): soft bounds, temperatures 1 and 1.05.
    pub fn sapo() -> Self {
        Self::grpo().with_surrogate(Surrogate::Sapo {
            positive: 1.0,
            negative: 1.05,
        })
    }

    /// [VESPO](https://arxiv.org/abs/2602.10693): a smooth weight of the sequence's ratio, (2, 3) and (3, 2).
    pub fn vespo() -> Self {
        Self::new().with_surrogate(Surrogate::Vespo {
            positive: (2.0, 3.0),
            negative: (3.0, 2.0),
        })
    }

    /// [LUSPO](https://arxiv.org/abs/2602.05261): ratios of sequences as in GSPO, each weighted by its length.
    pub fn luspo() -> Self {
        Self::gspo().with_aggregate(Aggregate::SequenceSum)
    }

    /// [RLOO](https://arxiv.org/abs/2402.14740): ratios of whole completions, ε = 0.2, the mean over sequences.
    pub fn rloo() -> Self {
        Self::grpo().with_level(Level::SequenceSum)
    }

    /// With another term of a token.
    pub fn with_surrogate(mut self, surrogate: Surrogate) -> Self {
        self.surrogate = surrogate;
        self
    }

    /// With another kind of ratio.
    pub fn with_level(mut self, level: Level) -> Self {
        self.level = level;
        self
    }

    /// With another way to one number.
    pub fn with_aggregate(mut self, aggregate: Aggregate) -> Self {
        self.aggregate = aggregate;
        self
    }

    /// With the divergence from a reference.
    pub fn with_kl(mut self, kl: KlPenalty) -> Self {
        self.kl = Some(kl);
        self
    }

    /// With an entropy bonus.
    pub fn with_entropy_coef(mut self, entropy_coef: f64) -> Self {
        self.entropy_coef = entropy_coef;
        self
    }

    pub(super) fn check(&self, longest: usize) -> Result<()> {
        self.surrogate.check()?;
        match self.aggregate {
            Aggregate::Constant(max) if max < longest => {
                return Err(PeftError::config(
                    "aggregate",
                    format!("Constant({max})"),
                    format!("at least {longest}, the tokens of the longest completion here"),
                ));
            }
            _ => {}
        }
        let coefs = [
            ("kl.coef", self.kl.map_or(0.0, |kl| kl.coef)),
            ("entropy_coef", self.entropy_coef),
        ];
        for (name, coef) in coefs {
            if !(coef.is_finite() && coef >= 0.0) {
                return Err(PeftError::config(name, coef, "a finite number, at least 0"));
            }
        }
        Ok(())
    }
}
