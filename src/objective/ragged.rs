//! Numbers per token on the host.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::LogProbs;
use super::segments;
use crate::{PeftError, Result};

/// Host-side numbers per token, the sequences one after another: log-probabilities of a sampler, rewards, values, advantages.
#[derive(Clone, Debug, PartialEq)]
pub struct Ragged {
    values: Vec<f32>,
    lens: Arc<[usize]>,
}

impl Ragged {
    /// `values [tokens]` of sequences of `lens` tokens.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`](crate::PeftError::Config) for a sequence without tokens, which it names, and for no sequences;
    /// [`PeftError::Shape`](crate::PeftError::Shape) where the lengths do not add up to the values.
    pub fn new(values: Vec<f32>, lens: impl Into<Arc<[usize]>>) -> Result<Self> {
        let lens = lens.into();
        segments::check_lens(&lens, values.len())?;
        Ok(Self { values, lens })
    }

    /// One row for each sequence.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_rows<R: AsRef<[f32]>>(rows: &[R]) -> Result<Self> {
        let lens: Vec<_> = rows.iter().map(|row| row.as_ref().len()).collect();
        let values = rows.iter().flat_map(|row| row.as_ref()).copied().collect();
        Self::new(values, lens)
    }

    /// Every token of a sequence has the sequence's number.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and where there is not one number for each sequence.
    pub fn spread(sequences: &[f32], lens: impl Into<Arc<[usize]>>) -> Result<Self> {
        let lens = lens.into();
        segments::same_count("sequences", sequences.len(), lens.len())?;
        let rows = sequences.iter().zip(lens.iter());
        let values = rows
            .flat_map(|(value, len)| std::iter::repeat_n(*value, *len))
            .collect();
        Self::new(values, lens)
    }

    /// Other values of the same sequences.
    pub(super) fn with_values(&self, values: Vec<f32>) -> Self {
        debug_assert_eq!(values.len(), self.values.len());
        Self {
            values,
            lens: self.lens.clone(),
        }
    }

    /// The values of all tokens, `[tokens]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Tokens of every sequence; each at least one.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Count of sequences.
    pub fn sequences(&self) -> usize {
        self.lens.len()
    }

    /// Count of tokens.
    pub fn tokens(&self) -> usize {
        self.values.len()
    }

    /// The sequences' values, in order.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        let mut rest = &self.values[..];
        self.lens.iter().map(move |len| {
            let (row, after) = rest.split_at(*len);
            rest = after;
            row
        })
    }

    /// The sum of every sequence, added in f64.
    pub fn sums(&self) -> Vec<f32> {
        let sum = |row: &[f32]| row.iter().map(|v| f64::from(*v)).sum::<f64>() as f32;
        self.rows().map(sum).collect()
    }

    /// The values on a device, `[tokens]`, without graph.
    pub fn to_tensor(&self, device: &Device, dtype: DType) -> Tensor<1> {
        let data = TensorData::new(self.values.clone(), [self.values.len()]);
        Tensor::from_data(data, (device, dtype))
    }

    /// The values as log-probabilities on a device, without graph: those that a sampler recorded.
    pub fn to_log_probs(&self, device: &Device, dtype: DType) -> LogProbs {
        LogProbs::known(self.to_tensor(device, dtype), self.lens.clone())
    }

    /// Refuses a value that is not finite, and names its sequence and token.
    pub(super) fn check_finite(&self, name: &str) -> Result<()> {
        let expected = "a finite number: leave the sequence out, or give it a value";
        self.check_each(name, expected, |value| value.is_finite())
    }

    /// Refuses a value that is not as expected, and names its sequence and token.
    pub(super) fn check_each(
        &self,
        name: &str,
        expected: &str,
        is_good: impl Fn(f32) -> bool,
    ) -> Result<()> {
        for (row, values) in self.rows().enumerate() {
            if let Some(token) = values.iter().position(|value| !is_good(*value)) {
                let name = format!("{name}[{row}][{token}]");
                return Err(PeftError::config(name, values[token], expected));
            }
        }
        Ok(())
    }

    pub(super) fn shared_lens(&self) -> Arc<[usize]> {
        self.lens.clone()
    }
}
