//! Log-probabilities of the labelled tokens of a batch, ragged: what every objective of alignment computes with.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::ragged::Ragged;
use super::segments;
use crate::tensor::constant;
use crate::{PeftError, Result};

/// One value for each labelled token, the sequences one after another, without padding.
///
/// ```text
/// ℓ_t = ln π(y_t | y_<t, x)        L = Σ_t ℓ_t  of one sequence
/// ```
///
/// Every sequence has at least one token, so no mean divides by zero. No mask exists that could be applied twice, and no padding
/// that could leak into a sum: the sums of a sequence depend on its own values alone.
#[derive(Clone, Debug)]
pub struct LogProbs {
    /// `ln π` of every labelled token, in nats, `[tokens]`.
    pub values: Tensor<1>,
    /// The entropy of the distribution that every labelled token was predicted from, in nats, `[tokens]`.
    pub entropy: Option<Tensor<1>>,
    /// The mean `(1/V)·Σ_j ln p_j` over the vocabulary, `[tokens]`: for label smoothing.
    pub mean: Option<Tensor<1>>,
    /// `ln Σ_j p_j²` of the same distributions, `[tokens]`, without graph: for the weights of WPO.
    pub log_sum_sq: Option<Tensor<1>>,
    /// 1 where the label is the most probable token and 0 elsewhere, `[tokens]`, without graph: for the token accuracy.
    pub is_top1: Option<Tensor<1>>,
    lens: Arc<[usize]>,
}

impl LogProbs {
    /// `values [tokens]` of sequences of `lens` tokens.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a sequence without tokens, which it names, and for no sequences; [`PeftError::Shape`] where the
    /// lengths do not add up to the values.
    pub fn new(values: Tensor<1>, lens: impl Into<Arc<[usize]>>) -> Result<Self> {
        let lens = lens.into();
        segments::check_lens(&lens, values.dims()[0])?;
        Ok(Self::known(values, lens))
    }

    /// Values whose lengths were checked.
    pub(crate) fn known(values: Tensor<1>, lens: Arc<[usize]>) -> Self {
        Self {
            values,
            entropy: None,
            mean: None,
            log_sum_sq: None,
            is_top1: None,
            lens,
        }
    }

    /// With the entropy at every labelled token.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] where it is not one value for each token.
    pub fn with_entropy(mut self, entropy: Tensor<1>) -> Result<Self> {
        segments::same_count("entropy", entropy.dims()[0], self.tokens())?;
        self.entropy = Some(entropy);
        Ok(self)
    }

    /// With the mean of `ln p` over the vocabulary at every labelled token.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] where it is not one value for each token.
    pub fn with_mean(mut self, mean: Tensor<1>) -> Result<Self> {
        segments::same_count("mean", mean.dims()[0], self.tokens())?;
        self.mean = Some(mean);
        Ok(self)
    }

    /// With `ln Σ_j p_j²` at every labelled token. The graph is cut.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] where it is not one value for each token.
    pub fn with_log_sum_sq(mut self, log_sum_sq: Tensor<1>) -> Result<Self> {
        segments::same_count("log_sum_sq", log_sum_sq.dims()[0], self.tokens())?;
        self.log_sum_sq = Some(constant(log_sum_sq));
        Ok(self)
    }

    /// With 1 where the label is the most probable token, else 0. The graph is cut.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] where it is not one value for each token.
    pub fn with_top1(mut self, is_top1: Tensor<1>) -> Result<Self> {
        segments::same_count("is_top1", is_top1.dims()[0], self.tokens())?;
        self.is_top1 = Some(constant(is_top1));
        Ok(self)
    }

    /// Labelled tokens of every sequence; each at least one.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Count of sequences; at least one.
    pub fn sequences(&self) -> usize {
        self.lens.len()
    }

    /// Count of labelled tokens.
    pub fn tokens(&self) -> usize {
        self.values.dims()[0]
    }

    /// `Σ_t ℓ_t` of every sequence, `[sequences]`.
    pub fn sums(&self) -> Tensor<1> {
        segments::sums(self.values.clone(), &self.lens)
    }

    /// `Σ_t ℓ_t / n` of every sequence, `[sequences]`.
    pub fn means(&self) -> Tensor<1> {
        segments::means(self.values.clone(), &self.lens)
    }

    /// The same numbers without graph.
    pub fn detach(self) -> Self {
        self.map(constant)
    }

    /// The first `n` sequences, and the others.
    ///
    /// # Panics
    ///
    /// When one of both would have no sequences.
    pub fn split_at(self, n: usize) -> (Self, Self) {
        assert!(
            0 < n && n < self.sequences(),
            "{} sequences are split at {n}, and one side would be empty",
            self.sequences()
        );
        let tokens: usize = self.lens[..n].iter().sum();
        let rest = self.tokens() - tokens;
        let mut first = self.clone().map(|x| x.narrow(0, 0, tokens));
        first.lens = self.lens[..n].into();
        let lens = self.lens[n..].into();
        let mut second = self.map(|x| x.narrow(0, tokens, rest));
        second.lens = lens;
        (first, second)
    }

    /// The sequences of all parts, in order. Entropy and the other numbers are kept where every part has them.
    ///
    /// # Panics
    ///
    /// When there are no parts.
    pub fn concat(parts: Vec<Self>) -> Self {
        assert!(
            !parts.is_empty(),
            "log-probabilities of no parts are put together"
        );
        let lens = parts.iter().flat_map(|part| part.lens.iter()).copied();
        let lens = lens.collect::<Vec<_>>().into();
        let all = |get: fn(&Self) -> Option<Tensor<1>>| {
            let every: Option<Vec<_>> = parts.iter().map(get).collect();
            every.map(|every| Tensor::cat(every, 0))
        };
        Self {
            values: Tensor::cat(parts.iter().map(|part| part.values.clone()).collect(), 0),
            entropy: all(|part| part.entropy.clone()),
            mean: all(|part| part.mean.clone()),
            log_sum_sq: all(|part| part.log_sum_sq.clone()),
            is_top1: all(|part| part.is_top1.clone()),
            lens,
        }
    }

    /// The values on the host, in f32. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::DeviceRead`] when the device fails.
    pub fn to_ragged(&self) -> Result<Ragged> {
        let values = super::read("log-probabilities", self.values.clone())?;
        Ragged::new(values, self.lens.clone())
    }

    /// The values as constants beside `like`: on its device, in its dtype, ready for operations with a tracked tensor.
    pub(super) fn beside(&self, like: &Tensor<1>) -> Tensor<1> {
        beside(self.values.clone(), like)
    }

    fn map(self, f: impl Fn(Tensor<1>) -> Tensor<1>) -> Self {
        Self {
            values: f(self.values),
            entropy: self.entropy.map(&f),
            mean: self.mean.map(&f),
            log_sum_sq: self.log_sum_sq.map(&f),
            is_top1: self.is_top1.map(&f),
            lens: self.lens,
        }
    }
}

/// The value alone, where `like` is: on its device, in its dtype, with autodiff where `like` has it.
pub(super) fn beside(x: Tensor<1>, like: &Tensor<1>) -> Tensor<1> {
    let x = constant(x).without_autodiff();
    let x = x.to_device(&like.device().without_autodiff());
    let x = crate::tensor::cast(x, like.dtype().into());
    match like.is_autodiff() {
        true => x.autodiff(),
        false => x,
    }
}

/// The values of a tensor on the host, in f32.
pub(super) fn read(name: &str, x: Tensor<1>) -> Result<Vec<f32>> {
    x.try_into_vec_as::<f32>()
        .map_err(|error| PeftError::DeviceRead {
            tensor: name.into(),
            reason: error.to_string(),
        })
}
