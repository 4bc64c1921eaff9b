//! Padded batches for next-token prediction: column `j` of a row is given token `j` and learns token `j + 1`.
//!
//! ```text
//! example  a b C D $      tokens   a b C D .      C, D and $ are supervised,
//! example  e F $          targets  b C D $ .      . is padding,
//!                         mask     0 1 1 1 0      and likewise for the second row.
//! ```

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use super::Example;

/// Makes batches by padding every example on the right to the longest.
///
/// Padding on the right needs no attention mask in a causal model: no token sees what follows it, and padded targets
/// are not in the mask.
///
/// Burn's `DataLoader` wants its own trait, which Burn has behind its feature `dataset` and this crate does without:
///
/// ```text
/// struct InstructionBatcher(PaddedBatcher);
///
/// impl burn::data::dataloader::batcher::Batcher<Example, Batch> for InstructionBatcher {
///     fn batch(&self, items: Vec<Example>, device: &Device) -> Batch {
///         self.0.collate(&items).to_device(device)
///     }
/// }
/// ```
#[derive(Clone, Debug)]
pub struct PaddedBatcher {
    pad_token: u32,
    multiple_of: usize,
}

impl PaddedBatcher {
    /// Pads with `pad_token`. Any token of the vocabulary does: padding is told by its place, not by its token.
    /// A token of 2^31 or more makes [`HostBatch::to_device`] panic on devices with 32-bit integers.
    pub fn new(pad_token: u32) -> Self {
        Self {
            pad_token,
            multiple_of: 1,
        }
    }

    /// Rounds the length of each batch up to a multiple of this (zero counts as one), for devices that compile or tune
    /// a kernel per shape.
    pub fn with_multiple_of(mut self, multiple_of: usize) -> Self {
        self.multiple_of = multiple_of.max(1);
        self
    }

    /// Makes a batch of `examples`, a row each.
    pub fn collate(&self, examples: &[Example]) -> HostBatch {
        self.collate_refs(&examples.iter().collect::<Vec<_>>())
    }

    /// As [`collate`](Self::collate), for examples that lie apart.
    pub fn collate_refs(&self, examples: &[&Example]) -> HostBatch {
        // The last token is only ever a target.
        let longest = examples.iter().map(|e| e.tokens().len() - 1).max();
        let columns = longest.unwrap_or(0).next_multiple_of(self.multiple_of);
        let rows = examples.len();
        let pad = i64::from(self.pad_token);
        let mut batch = HostBatch {
            rows,
            columns,
            tokens: vec![pad; rows * columns],
            targets: vec![pad; rows * columns],
            mask: vec![false; rows * columns],
            padding: vec![true; rows * columns],
        };
        for (row, example) in examples.iter().enumerate() {
            let pairs = example.tokens().windows(2);
            for (column, (pair, &supervised)) in pairs.zip(&example.supervised()[1..]).enumerate() {
                let at = row * columns + column;
                batch.tokens[at] = pair[0].into();
                batch.targets[at] = pair[1].into();
                batch.mask[at] = supervised;
                batch.padding[at] = false;
            }
        }
        batch
    }
}

/// A batch in plain vectors, row-major of shape `[rows, columns]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBatch {
    /// The number of examples.
    pub rows: usize,
    /// The number of tokens per row, padding included.
    pub columns: usize,
    /// What the model is given.
    pub tokens: Vec<i64>,
    /// The token that follows each.
    pub targets: Vec<i64>,
    /// Which targets count in the loss.
    pub mask: Vec<bool>,
    /// Which tokens are padding.
    pub padding: Vec<bool>,
}

impl HostBatch {
    /// How many targets count in the loss.
    pub fn supervised(&self) -> usize {
        self.mask.iter().filter(|&&m| m).count()
    }

    /// Copies the batch to a device.
    pub fn to_device(&self, device: &Device) -> Batch {
        let shape = [self.rows, self.columns];
        let ints = |values: &Vec<i64>| {
            Tensor::<2, Int>::from_data(TensorData::new(values.clone(), shape), device)
        };
        let bools = |values: &Vec<bool>| {
            Tensor::<2, Bool>::from_data(TensorData::new(values.clone(), shape), device)
        };
        Batch {
            tokens: ints(&self.tokens),
            targets: ints(&self.targets),
            mask: bools(&self.mask),
            padding: bools(&self.padding),
            supervised: self.supervised(),
        }
    }
}

/// A batch on a device; all tensors of shape `[batch, seq]`.
#[derive(Clone, Debug)]
pub struct Batch {
    /// What the model is given.
    pub tokens: Tensor<2, Int>,
    /// The token that follows each.
    pub targets: Tensor<2, Int>,
    /// Which targets count in the loss.
    pub mask: Tensor<2, Bool>,
    /// Which tokens are padding.
    pub padding: Tensor<2, Bool>,
    /// How many targets count in the loss, known without asking the device. The sum of it over the micro-batches of a
    /// step is what [`SftLoss::over`](crate::objective::SftLoss::over) wants.
    pub supervised: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Example> {
        let first = Example::new(vec![1, 2, 3, 4, 9], vec![false, false, true, true, true]);
        let second = Example::new(vec![5, 6, 9], vec![true, false, true]);
        vec![first.unwrap(), second.unwrap()]
    }

    #[test]
    fn targets_are_the_next_tokens() {
        let batch = PaddedBatcher::new(0).collate(&examples());
        let expected = HostBatch {
            rows: 2,
            columns: 4,
            tokens: vec![1, 2, 3, 4, 5, 6, 0, 0],
            targets: vec![2, 3, 4, 9, 6, 9, 0, 0],
            mask: vec![false, true, true, true, false, true, false, false],
            padding: vec![false, false, false, false, false, false, true, true],
        };
        assert_eq!(batch, expected);
        assert_eq!(batch.supervised(), 4);
    }

    #[test]
    fn a_pad_token_that_is_also_the_end_token_is_still_supervised_as_the_end() {
        let batch = PaddedBatcher::new(9).collate(&examples());
        assert_eq!(batch.supervised(), 4);
        assert_eq!(batch.targets[4..], [6, 9, 9, 9]);
        assert_eq!(batch.mask[4..], [false, true, false, false]);
    }

    #[test]
    fn lengths_round_up() {
        let batch = PaddedBatcher::new(0)
            .with_multiple_of(8)
            .collate(&examples());
        assert_eq!(
            (batch.columns, batch.padding.iter().filter(|&&p| p).count()),
            (8, 10)
        );
        assert_eq!(
            PaddedBatcher::new(0)
                .with_multiple_of(0)
                .collate(&examples())
                .columns,
            4
        );
    }

    #[test]
    fn a_batch_on_a_device_holds_the_same() {
        let host = PaddedBatcher::new(0).collate(&examples());
        let batch = host.to_device(&Device::default().autodiff());
        assert_eq!(batch.tokens.dims(), [2, 4]);
        assert_eq!(batch.tokens.try_into_vec_as::<i64>().unwrap(), host.tokens);
        assert_eq!(
            batch.targets.try_into_vec_as::<i64>().unwrap(),
            host.targets
        );
        assert_eq!(batch.mask.try_into_vec_as::<bool>().unwrap(), host.mask);
        assert_eq!(
            batch.padding.try_into_vec_as::<bool>().unwrap(),
            host.padding
        );
        assert_eq!(batch.supervised, 4);
    }
}
