//! Rows of an embedding that an adapter trains: `E'[t_i] = R[i]`, PEFT's `trainable_token_indices`.
//!
//! `E [vocabulary, d]` the frozen embedding, `t_1 … t_k` the chosen tokens, `R [k, d]` their own rows, which begin as those of `E`.
//! All other rows stay as they are, and no gradient of them is kept. Where the output head is the embedding transposed, it has
//! the new rows too.

use std::collections::HashSet;

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, IndexingUpdateOp, Int, Tensor, module::embedding, module::linear};

use super::cast;
use crate::{PeftError, Result};

/// An adapter's own rows of a matrix `[vocabulary, d]`.
#[derive(Module, Debug)]
pub struct TrainedRows {
    /// `R`, of shape `[k, d]`.
    pub rows: Param<Tensor<2>>,
    #[module(skip)]
    indices: Vec<usize>,
    /// Whether the weight is the matrix transposed: that of a linear head, `[d, vocabulary]`.
    #[module(skip)]
    transposed: bool,
}

impl TrainedRows {
    /// The rows `indices` of `weight [vocabulary, d]`, in this order and in its dtype.
    ///
    /// # Errors
    ///
    /// As [`with_rows`](Self::with_rows).
    pub fn of(weight: &Tensor<2>, indices: &[usize]) -> Result<Self> {
        let [count, d] = weight.dims();
        check(indices, count)?;
        let rows = match indices.is_empty() {
            true => Tensor::zeros([0, d], &weight.device()),
            false => weight.clone().select(0, places(indices, weight)),
        };
        Self::with_rows(rows, indices, count)
    }

    /// Given `rows [k, d]` in place of the rows `indices` of a matrix of `count` rows.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for no index, an index that is not below `count` or that stands twice;
    /// [`PeftError::Shape`] for another number of rows.
    pub fn with_rows(rows: Tensor<2>, indices: &[usize], count: usize) -> Result<Self> {
        check(indices, count)?;
        let [found, d] = rows.dims();
        if found != indices.len() {
            return Err(PeftError::Shape {
                tensor: "trained rows".into(),
                expected: [indices.len(), d].into(),
                found: [found, d].into(),
            });
        }
        Ok(Self {
            rows: Param::from_tensor(rows.detach()),
            indices: indices.to_vec(),
            transposed: false,
        })
    }

    /// The same of a weight that is the matrix transposed, `[d, vocabulary]`: of a linear output head.
    pub fn of_head(self) -> Self {
        Self {
            transposed: true,
            ..self
        }
    }

    /// Whether the weight is the matrix transposed.
    pub fn is_of_head(&self) -> bool {
        self.transposed
    }

    /// Which rows of the matrix these are, in the order of [`rows`](Self::rows).
    pub fn indices(&self) -> &[usize] {
        &self.indices
    }

    /// Dtype of the rows.
    pub fn dtype(&self) -> FloatDType {
        self.rows.val().dtype().into()
    }

    /// `weight [vocabulary, d]`, or its transpose for a head, with these rows; all other values are the same to the bit.
    pub(crate) fn replace(&self, weight: Tensor<2>) -> Tensor<2> {
        match self.transposed {
            true => self.replace_rows(weight.transpose()).transpose(),
            false => self.replace_rows(weight),
        }
    }

    fn replace_rows(&self, weight: Tensor<2>) -> Tensor<2> {
        let places = places(&self.indices, &weight);
        let rows = cast(self.rows.val(), weight.dtype().into());
        let old = weight.clone().select(0, places.clone());
        // What is taken from itself leaves zero, and a value added to zero is the value.
        let cleared = weight.select_assign(0, places.clone(), -old, IndexingUpdateOp::Add);
        cleared.select_assign(0, places, rows, IndexingUpdateOp::Add)
    }

    /// What these rows add to the features `[.., d]` of `tokens`, which the embedding `weight [vocabulary, d]` gave.
    pub(crate) fn change(&self, tokens: Tensor<2, Int>, weight: &Tensor<2>) -> Tensor<3> {
        let old = weight
            .clone()
            .select(0, places(&self.indices, weight))
            .detach();
        let change = cast(self.rows.val(), old.dtype().into()) - old;
        embedding(after_zeros(change), self.slots(tokens, weight))
    }

    /// The features `[.., d]` of `tokens`, which the embedding `weight [vocabulary, d]` gave, with those of these rows in place of the
    /// weight's own, exactly.
    pub(crate) fn lookup(
        &self,
        tokens: Tensor<2, Int>,
        features: Tensor<3>,
        weight: &Tensor<2>,
    ) -> Tensor<3> {
        let slots = self.slots(tokens, weight);
        let rows = cast(self.rows.val(), features.dtype().into());
        let own = embedding(after_zeros(rows), slots.clone());
        let is_own = slots.greater_elem(0).unsqueeze_dim::<3>(2);
        features.mask_where(is_own.expand(own.dims()), own)
    }

    /// For each of `tokens`, one more than the place of its row among these, or 0 for all other tokens.
    fn slots(&self, tokens: Tensor<2, Int>, weight: &Tensor<2>) -> Tensor<2, Int> {
        let [count, _] = weight.dims();
        let device = weight.device();
        let slots = Tensor::<1, Int>::arange(1..self.indices.len() as i64 + 1, &device);
        let slot = Tensor::<1, Int>::zeros([count], &device).select_assign(
            0,
            places(&self.indices, weight),
            slots,
            IndexingUpdateOp::Add,
        );
        let [batch, length] = tokens.dims();
        let slot = slot.select(0, tokens.reshape([batch * length]));
        slot.reshape([batch, length])
    }
}

/// These rows after one of zeros.
fn after_zeros(rows: Tensor<2>) -> Tensor<2> {
    let [_, d] = rows.dims();
    let zeros = Tensor::zeros([1, d], (&rows.device(), rows.dtype()));
    Tensor::cat(vec![zeros, rows], 0)
}

impl TrainedRows {
    /// `y = x·Eᵀ [.., vocabulary]` with `weight` times what these rows change of it: the products with the features
    /// `x [.., d]`.
    pub(crate) fn attend<const D: usize>(
        &self,
        x: &Tensor<D>,
        y: Tensor<D>,
        embedding: &Tensor<2>,
        weight: f64,
    ) -> Tensor<D> {
        let places = places(&self.indices, embedding);
        let old = embedding.clone().select(0, places.clone()).detach();
        let change = cast(self.rows.val(), old.dtype().into()) - old;
        let change = cast(change, x.dtype().into()).mul_scalar(weight);
        let change = linear(x.clone(), change.transpose(), None);
        y.select_assign(D - 1, places, change, IndexingUpdateOp::Add)
    }
}

impl TrainedRows {
    /// The change of a head's logits as a low-rank one, `x·a·b`: the rows less those of `weight`, turned, `[d, n]`, and ones at
    /// the tokens' places, `[n, vocabulary]`. `weight` is `[vocabulary, d]`, or `[d, vocabulary]` for rows of a head of its own.
    pub(crate) fn factors(&self, weight: &Tensor<2>) -> [Tensor<2>; 2] {
        let places = places(&self.indices, weight);
        let (old, vocabulary) = match self.transposed {
            true => (weight.clone().select(1, places.clone()), weight.dims()[1]),
            false => {
                let old = weight.clone().select(0, places.clone());
                (old.transpose(), weight.dims()[0])
            }
        };
        let old = old.detach();
        let change = cast(self.rows.val(), old.dtype().into()).transpose() - old;
        let count = self.indices.len();
        let tokens = Tensor::<1, Int>::arange(0..vocabulary as i64, &weight.device());
        let tokens = tokens.unsqueeze::<2>().expand([count, vocabulary]);
        let places = places.reshape([count, 1]).expand([count, vocabulary]);
        let ones = tokens.equal(places).float();
        [change, ones]
    }
}

fn places(indices: &[usize], weight: &Tensor<2>) -> Tensor<1, Int> {
    let indices: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
    Tensor::from_data(indices.as_slice(), &weight.device())
}

fn check(indices: &[usize], count: usize) -> Result<()> {
    let error = |value: String, expected: &str| {
        Err(PeftError::config(
            "trainable_token_indices",
            value,
            expected,
        ))
    };
    let mut seen = HashSet::new();
    for &index in indices {
        if index >= count {
            return error(index.to_string(), &format!("below {count}"));
        }
        if !seen.insert(index) {
            return error(index.to_string(), "every token once");
        }
    }
    match indices.is_empty() {
        true => error("[]".into(), "at least one token"),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    #[test]
    fn chosen_rows_are_replaced_and_all_others_keep_their_bits() {
        let device = Device::flex();
        let weight = Tensor::<2>::random([7, 3], Distribution::Normal(0.0, 1e3), &device);
        let rows = Tensor::<2>::random([2, 3], Distribution::Normal(0.0, 1e-3), &device);
        let trained = TrainedRows::with_rows(rows.clone(), &[5, 1], 7).unwrap();
        let found = trained.replace(weight.clone());
        for (row, expected) in (0..7).map(|row| match row {
            5 => (5, rows.clone().narrow(0, 0, 1)),
            1 => (1, rows.clone().narrow(0, 1, 1)),
            row => (row, weight.clone().narrow(0, row, 1)),
        }) {
            let found = found.clone().narrow(0, row, 1);
            assert_eq!(found.into_data(), expected.into_data(), "row {row}");
        }
        let tokens = Tensor::<2, Int>::from_data([[5, 0, 1], [6, 5, 5]], &device);
        let features = embedding(weight.clone(), tokens.clone());
        let features = features + trained.change(tokens.clone(), &weight);
        let exact = trained.lookup(
            tokens.clone(),
            embedding(weight.clone(), tokens.clone()),
            &weight,
        );
        let expected = embedding(found.clone(), tokens.clone());
        assert_eq!(exact.into_data(), expected.into_data());
        let error = features - embedding(found, tokens);
        // `w + (r - w)` in f32, `w` about 1e3.
        assert!(error.abs().max().into_scalar::<f32>() < 5e-4);
    }

    #[test]
    fn bad_indices_are_errors_that_name_them() {
        let weight = Tensor::<2>::zeros([4, 2], &Device::flex());
        for (indices, part) in [
            (vec![4], "= 4"),
            (vec![1, 2, 1], "every token once"),
            (vec![], "at least one"),
        ] {
            let error = TrainedRows::of(&weight, &indices).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let error = TrainedRows::with_rows(weight, &[1], 4).unwrap_err();
        assert!(matches!(error, PeftError::Shape { .. }), "{error}");
    }
}
