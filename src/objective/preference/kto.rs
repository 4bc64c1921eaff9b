//! Kahneman and Tversky's optimisation: completions that are desirable or not, without pairs.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

use super::{check_not_negative, check_positive};
use crate::objective::{LogProbs, Loss, read, segments};
use crate::tensor::constant;
use crate::{PeftError, Result};

/// A loss of unpaired labels. `u` is the log-ratio of a completion, `z` the estimate of the policy's divergence from the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KtoLoss {
    /// `1 − σ(β(u − z))` for desirable ones, `1 − σ(β(z − u))` for others ([KTO](https://arxiv.org/abs/2402.01306)).
    #[default]
    Kto,
    /// The same with `z = 0` ([APO](https://arxiv.org/abs/2408.06266) for unpaired labels): needs no [`KlBatch`].
    ApoZeroUnpaired,
}

/// Options of [`kto_loss`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KtoConfig {
    /// β, above 0; 0.1 by default.
    pub beta: f64,
    /// Weight of the desirable completions. With `n_D` desirable ones of weight `w_D` and `n_U` others of weight `w_U` in the data,
    /// the paper advises `w_D·n_D / (w_U·n_U)` between 1 and 4/3.
    pub desirable_weight: f64,
    /// Weight of the others.
    pub undesirable_weight: f64,
    /// The loss.
    pub loss: KtoLoss,
}

impl Default for KtoConfig {
    fn default() -> Self {
        Self {
            beta: 0.1,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
            loss: KtoLoss::Kto,
        }
    }
}

impl KtoConfig {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// With another β.
    pub fn with_beta(mut self, beta: f64) -> Self {
        self.beta = beta;
        self
    }

    /// With these weights of desirable and of other completions.
    pub fn with_weights(mut self, desirable: f64, undesirable: f64) -> Self {
        [self.desirable_weight, self.undesirable_weight] = [desirable, undesirable];
        self
    }

    /// With another loss.
    pub fn with_loss(mut self, loss: KtoLoss) -> Self {
        self.loss = loss;
        self
    }

    fn check(&self) -> Result<()> {
        check_positive("beta", self.beta)?;
        check_not_negative("desirable_weight", self.desirable_weight)?;
        check_not_negative("undesirable_weight", self.undesirable_weight)
    }
}

/// Log-probabilities of mismatched completions, prompt `i` with the completion of [`kl_partners`]`[i]`, by the policy and by the
/// reference. Their mean log-ratio estimates how far the policy is from the reference.
#[derive(Clone, Debug)]
pub struct KlBatch {
    /// By the policy; its gradient is not used.
    pub policy: LogProbs,
    /// By the reference.
    pub reference: LogProbs,
}

/// Whose completion each prompt of a micro-batch gets in the [`KlBatch`]: that of the row before, the first row that of the last.
///
/// # Errors
///
/// [`PeftError::Config`] for fewer than two rows: the only row would get its own completion, and the estimate would be its own
/// log-ratio.
pub fn kl_partners(rows: usize) -> Result<Vec<usize>> {
    check_rows(rows)?;
    Ok((0..rows).map(|row| (row + rows - 1) % rows).collect())
}

fn check_rows(rows: usize) -> Result<()> {
    match rows < 2 {
        true => Err(PeftError::config(
            "rows of a micro-batch of KTO",
            rows,
            "at least 2: each prompt is paired with another row's completion",
        )),
        false => Ok(()),
    }
}

/// The loss of one (micro-)batch of unpaired completions.
#[derive(Clone, Debug)]
pub struct FeedbackLoss {
    /// The sum over the rows, with their weights; the count is that of rows.
    pub loss: Loss,
    /// `z`, the estimated divergence from the reference, `[1]`, without graph; 0 where the loss has none.
    pub kl: Tensor<1>,
    /// `β·u` of every row, `[rows]`, without graph.
    pub rewards: Tensor<1>,
    /// The log-probability of every row's completion, `[rows]`, without graph.
    pub log_probs: Tensor<1>,
    /// The entropy at every token, `[tokens]`, without graph, where the policy has it.
    pub entropy: Option<Tensor<1>>,
    desirable: Vec<bool>,
}

/// Means over a batch of unpaired completions, under the names that TRL logs. What is a mean over no rows is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FeedbackMetrics {
    /// `kl`: the estimated divergence from the reference.
    pub kl: f32,
    /// `rewards/chosen`: the mean implicit reward of the desirable completions.
    pub reward_chosen: Option<f32>,
    /// `rewards/rejected`: that of the others.
    pub reward_rejected: Option<f32>,
    /// `rewards/margins`: the difference of both.
    pub margin: Option<f32>,
    /// `logps/chosen`: the mean log-probability of the desirable completions.
    pub log_probs_chosen: Option<f32>,
    /// `logps/rejected`: that of the others.
    pub log_probs_rejected: Option<f32>,
    /// `entropy`: the mean over all tokens.
    pub entropy: Option<f32>,
}

/// The loss of completions that are each desirable or not.
///
/// ```text
/// u = Σ_t (ℓ_t − ℓ^ref_t)        z = max(0, mean_i u^KL_i), without gradient
/// loss = Σ_i w_i · (1 − σ(±β(u_i − z)))
/// ```
///
/// `z` is the mean over the mismatched completions of this micro-batch, so its value depends on which rows share one.
///
/// # Errors
///
/// [`PeftError::Config`] for an option out of range; for a reference with other sequences (which it names); for a count of labels that
/// is not that of sequences; for [`KtoLoss::Kto`] without a [`KlBatch`], with one of another count of sequences, or with a
/// micro-batch of one row.
pub fn kto_loss(
    policy: &LogProbs,
    reference: &LogProbs,
    desirable: &[bool],
    kl: Option<&KlBatch>,
    config: &KtoConfig,
) -> Result<FeedbackLoss> {
    config.check()?;
    segments::same_lens("reference", reference.lens(), policy.lens())?;
    if desirable.len() != policy.sequences() {
        return Err(PeftError::config(
            "labels",
            desirable.len(),
            format!("{}, one for each sequence", policy.sequences()),
        ));
    }
    let ratios = policy.values.clone() - reference.beside(&policy.values);
    let u = segments::sums(ratios, policy.lens());
    let z = match config.loss {
        KtoLoss::ApoZeroUnpaired => Tensor::zeros([1], (&u.device(), u.dtype())),
        KtoLoss::Kto => divergence(policy, kl, &u)?,
    };

    let signs = desirable.iter().map(|d| if *d { -1.0 } else { 1.0 });
    let signs = segments::host(signs.collect(), &u);
    let weights = desirable.iter().map(|d| match d {
        true => config.desirable_weight,
        false => config.undesirable_weight,
    });
    let weights = segments::host(weights.collect(), &u);
    // 1 − σ(x) is σ(−x).
    let terms = sigmoid((u.clone() - z.clone()) * signs * config.beta) * weights;
    Ok(FeedbackLoss {
        loss: Loss {
            sum: terms.sum(),
            count: policy.sequences(),
        },
        kl: constant(z),
        rewards: constant(u * config.beta),
        log_probs: constant(policy.sums()),
        entropy: policy.entropy.clone().map(constant),
        desirable: desirable.into(),
    })
}

/// `z`, without graph.
fn divergence(policy: &LogProbs, kl: Option<&KlBatch>, like: &Tensor<1>) -> Result<Tensor<1>> {
    let rows = policy.sequences();
    check_rows(rows)?;
    let Some(kl) = kl else {
        return Err(PeftError::config(
            "kl",
            "none",
            "the log-probabilities of mismatched completions, as `kl_partners` pairs them",
        ));
    };
    segments::same_lens("kl.reference", kl.reference.lens(), kl.policy.lens())?;
    if kl.policy.sequences() != rows {
        return Err(PeftError::config(
            "sequences of `kl.policy`",
            kl.policy.sequences(),
            format!("{rows}, one for each of the policy's"),
        ));
    }
    let ratios = kl.policy.beside(like) - kl.reference.beside(like);
    Ok((ratios.sum() / rows as f64).clamp_min(0.0))
}

impl FeedbackLoss {
    /// The numbers to log. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::DeviceRead`] when the device fails.
    pub fn metrics(&self) -> Result<FeedbackMetrics> {
        let rewards = read("rewards", self.rewards.clone())?;
        let log_probs = read("log-probabilities", self.log_probs.clone())?;
        let kl = read("kl", self.kl.clone())?[0];
        let entropy = match &self.entropy {
            None => None,
            Some(entropy) => Some(read("entropy", entropy.clone().mean())?[0]),
        };
        let mean = |values: &[f32], class: bool| {
            let of_class = values.iter().zip(&self.desirable);
            let of_class = of_class.filter(|(_, d)| **d == class);
            let (sum, count) = of_class.fold((0.0, 0), |(sum, count), (value, _)| {
                (sum + f64::from(*value), count + 1)
            });
            (count > 0).then(|| (sum / f64::from(count)) as f32)
        };
        let [reward_chosen, reward_rejected] = [true, false].map(|class| mean(&rewards, class));
        let [log_probs_chosen, log_probs_rejected] =
            [true, false].map(|class| mean(&log_probs, class));
        Ok(FeedbackMetrics {
            kl,
            reward_chosen,
            reward_rejected,
            margin: reward_chosen.zip(reward_rejected).map(|(c, r)| c - r),
            log_probs_chosen,
            log_probs_rejected,
            entropy,
        })
    }
}
