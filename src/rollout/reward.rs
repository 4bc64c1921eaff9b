//! What a completion is worth: functions of prompt, completion and data.

use std::error::Error;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use super::completion::Completion;
use super::scores::{RewardColumn, Scores};
use crate::{PeftError, Result};

/// Any error, of a reward.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// What a reward judges: one completion with its prompt, its text, and whatever else the row of the data holds.
#[derive(Debug)]
pub struct Rollout<'a, D: ?Sized = ()> {
    /// The tokens of the prompt.
    pub prompt: &'a [u32],
    /// The completion.
    pub completion: &'a Completion,
    /// Its text, by the user's tokenizer; empty if none was given.
    pub text: &'a str,
    /// The row of the data, for instance with the right answer.
    pub data: &'a D,
}

impl<'a> Rollout<'a> {
    /// Of a prompt and its completion alone.
    pub fn new(prompt: &'a [u32], completion: &'a Completion) -> Self {
        Self {
            prompt,
            completion,
            text: "",
            data: &(),
        }
    }
}

impl<'a, D: ?Sized> Rollout<'a, D> {
    /// The same with the text of the completion.
    pub fn with_text(mut self, text: &'a str) -> Self {
        self.text = text;
        self
    }

    /// The same with a row of data.
    pub fn with_data<D2: ?Sized>(self, data: &'a D2) -> Rollout<'a, D2> {
        Rollout {
            prompt: self.prompt,
            completion: self.completion,
            text: self.text,
            data,
        }
    }

    /// The tokens of the completion.
    pub fn tokens(&self) -> &'a [u32] {
        &self.completion.tokens
    }
}

/// What a reward says of one completion: a number, or nothing where it does not apply to that row.
///
/// Closures may return `f64`, `f32`, `bool` (1 or 0), an `Option` or a `Result` of these.
pub trait Score {
    /// The score, none where the reward does not apply, or why there is none.
    fn into_score(self) -> Result<Option<f64>, BoxError>;
}

impl Score for f64 {
    fn into_score(self) -> Result<Option<f64>, BoxError> {
        Ok(Some(self))
    }
}

impl Score for f32 {
    fn into_score(self) -> Result<Option<f64>, BoxError> {
        Ok(Some(self.into()))
    }
}

impl Score for bool {
    fn into_score(self) -> Result<Option<f64>, BoxError> {
        Ok(Some(u8::from(self).into()))
    }
}

impl<S: Score> Score for Option<S> {
    fn into_score(self) -> Result<Option<f64>, BoxError> {
        self.map_or(Ok(None), Score::into_score)
    }
}

impl<S: Score, E: Into<BoxError>> Score for Result<S, E> {
    fn into_score(self) -> Result<Option<f64>, BoxError> {
        self.map_err(Into::into)?.into_score()
    }
}

/// What completions are worth. Every closure of a [`Rollout`] that returns a [`Score`] is one.
///
/// Implement it for what judges many completions at once, as a reward model does.
pub trait Reward<D: ?Sized = ()> {
    /// One score for each rollout, in order.
    fn score(&self, rollouts: &[Rollout<'_, D>]) -> Vec<Result<Option<f64>, BoxError>>;
}

impl<D: ?Sized, S: Score, F: Fn(&Rollout<'_, D>) -> S> Reward<D> for F {
    fn score(&self, rollouts: &[Rollout<'_, D>]) -> Vec<Result<Option<f64>, BoxError>> {
        let scores = rollouts.iter().map(|rollout| self(rollout).into_score());
        scores.collect()
    }
}

/// The scores of an [`AsyncReward`] to come.
pub type Pending<'a> = Pin<Box<dyn Future<Output = Vec<Result<Option<f64>, BoxError>>> + 'a>>;

/// A reward that waits: for a server, a sandbox or another process. It needs no particular runtime.
pub trait AsyncReward<D: ?Sized = ()> {
    /// One score for each rollout, in order.
    fn score<'a>(&'a self, rollouts: &'a [Rollout<'a, D>]) -> Pending<'a>;
}

enum Kind<'r, D: ?Sized> {
    Direct(Box<dyn Reward<D> + 'r>),
    Async(Box<dyn AsyncReward<D> + 'r>),
}

struct Named<'r, D: ?Sized> {
    name: String,
    weight: f64,
    kind: Kind<'r, D>,
}

/// Several rewards, each with a name and a weight. What a completion gets is the weighted sum.
pub struct Rewards<'r, D: ?Sized = ()> {
    rewards: Vec<Named<'r, D>>,
}

impl<D: ?Sized> Default for Rewards<'_, D> {
    fn default() -> Self {
        Self {
            rewards: Vec::new(),
        }
    }
}

impl<D: ?Sized> fmt::Debug for Rewards<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let named = self.rewards.iter().map(|own| (&own.name, own.weight));
        f.debug_map().entries(named).finish()
    }
}

impl<'r, D: ?Sized> Rewards<'r, D> {
    /// No reward yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a reward.
    pub fn with(self, name: impl Into<String>, weight: f64, reward: impl Reward<D> + 'r) -> Self {
        self.add(name.into(), weight, Kind::Direct(Box::new(reward)))
    }

    /// Adds a reward that waits. [`score_async`](Self::score_async) runs all of these at the same time.
    pub fn with_async(
        self,
        name: impl Into<String>,
        weight: f64,
        reward: impl AsyncReward<D> + 'r,
    ) -> Self {
        self.add(name.into(), weight, Kind::Async(Box::new(reward)))
    }

    fn add(mut self, name: String, weight: f64, kind: Kind<'r, D>) -> Self {
        self.rewards.push(Named { name, weight, kind });
        self
    }

    /// Scores rollouts by every reward.
    ///
    /// # Errors
    ///
    /// [`PeftError::Reward`] where a reward fails, gives NaN or an infinity, or another number of scores than there are rollouts; and
    /// where none applies to a row. [`PeftError::Config`] for no rewards, two of one name, a weight that is not finite, and a reward that
    /// waits.
    pub fn score(&self, rollouts: &[Rollout<'_, D>]) -> Result<Scores> {
        self.validate()?;
        let mut columns = Vec::with_capacity(self.rewards.len());
        for own in &self.rewards {
            match &own.kind {
                Kind::Direct(reward) => columns.push(reward.score(rollouts)),
                Kind::Async(_) => {
                    let expected = "`score_async`, as the reward waits";
                    return Err(PeftError::config(own.at(), "in `score`", expected));
                }
            }
        }
        self.gather(columns, rollouts.len())
    }

    /// As [`score`](Self::score), with rewards that wait, all at the same time. It needs no particular runtime.
    ///
    /// # Errors
    ///
    /// As [`score`](Self::score).
    pub async fn score_async<'a>(&'a self, rollouts: &'a [Rollout<'a, D>]) -> Result<Scores> {
        self.validate()?;
        let start = |own: &'a Named<'r, D>| match &own.kind {
            Kind::Direct(_) => None,
            Kind::Async(reward) => Some(reward.score(rollouts)),
        };
        let mut pending: Vec<Option<Pending>> = self.rewards.iter().map(start).collect();
        let mut columns: Vec<_> = pending.iter().map(|_| None).collect();
        let mut is_first = true;
        poll_fn(|context| {
            for (future, column) in pending.iter_mut().zip(&mut columns) {
                if let Some(Poll::Ready(scores)) =
                    future.as_mut().map(|own| own.as_mut().poll(context))
                {
                    *future = None;
                    *column = Some(scores);
                }
            }
            // The others compute while these wait.
            if std::mem::take(&mut is_first) {
                for (own, column) in self.rewards.iter().zip(&mut columns) {
                    if let Kind::Direct(reward) = &own.kind {
                        *column = Some(reward.score(rollouts));
                    }
                }
            }
            match columns.iter().all(Option::is_some) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        self.gather(columns.into_iter().flatten().collect(), rollouts.len())
    }

    fn validate(&self) -> Result<()> {
        if self.rewards.is_empty() {
            return Err(PeftError::config("Rewards", "none", "at least one reward"));
        }
        for (index, own) in self.rewards.iter().enumerate() {
            if !own.weight.is_finite() {
                let name = format!("weight of {}", own.at());
                return Err(PeftError::config(name, own.weight, "a finite number"));
            }
            if self.rewards[..index]
                .iter()
                .any(|other| other.name == own.name)
            {
                let expected = "a name of its own for each reward";
                return Err(PeftError::config("name of a reward", &own.name, expected));
            }
        }
        Ok(())
    }

    fn gather(
        &self,
        columns: Vec<Vec<Result<Option<f64>, BoxError>>>,
        rows: usize,
    ) -> Result<Scores> {
        let error = |own: &Named<D>, row, reason: String| PeftError::Reward {
            reward: own.name.clone(),
            row,
            reason,
        };
        let mut totals = vec![0.0; rows];
        let mut is_scored = vec![false; rows];
        let mut gathered = Vec::with_capacity(columns.len());
        for (own, column) in self.rewards.iter().zip(columns) {
            if column.len() != rows {
                let reason = format!("it gave {} scores for {rows} completions", column.len());
                return Err(error(own, column.len().min(rows), reason));
            }
            let mut values = Vec::with_capacity(rows);
            for (row, score) in column.into_iter().enumerate() {
                let score = score.map_err(|reason| error(own, row, reason.to_string()))?;
                if let Some(value) = score {
                    if !value.is_finite() {
                        return Err(error(own, row, format!("its score is {value}")));
                    }
                    totals[row] += own.weight * value;
                    is_scored[row] = true;
                }
                values.push(score);
            }
            gathered.push(RewardColumn {
                name: own.name.clone(),
                weight: own.weight,
                values,
            });
        }
        if let Some(row) = is_scored.iter().position(|is_scored| !is_scored) {
            let names: Vec<_> = self.rewards.iter().map(|own| own.name.as_str()).collect();
            return Err(PeftError::Reward {
                reward: names.join(", "),
                row,
                reason: "none of the rewards applies to it".into(),
            });
        }
        if let Some(row) = totals.iter().position(|total| !total.is_finite()) {
            return Err(PeftError::Reward {
                reward: "the weighted sum".into(),
                row,
                reason: format!("it is {}", totals[row]),
            });
        }
        Ok(Scores {
            totals,
            columns: gathered,
        })
    }
}

impl<D: ?Sized> Named<'_, D> {
    fn at(&self) -> String {
        format!("reward `{}`", self.name)
    }
}
