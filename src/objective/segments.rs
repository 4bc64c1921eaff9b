//! Sums over the sequences of a ragged tensor, and the way back.

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::{PeftError, Result};

/// For every token the number of its sequence, `[tokens]`.
fn owners(lens: &[usize], device: &Device) -> Tensor<1, Int> {
    let owners: Vec<i64> = lens
        .iter()
        .enumerate()
        .flat_map(|(sequence, len)| std::iter::repeat_n(sequence as i64, *len))
        .collect();
    let tokens = owners.len();
    Tensor::from_data(TensorData::new(owners, [tokens]), device)
}

/// The sum of every sequence: `[tokens] -> [sequences]`. Its gradient is [`spread`].
pub(super) fn sums(values: Tensor<1>, lens: &[usize]) -> Tensor<1> {
    let device = values.device();
    let zeros = Tensor::zeros([lens.len()], (&device, values.dtype()));
    zeros.select_assign(0, owners(lens, &device), values, IndexingUpdateOp::Add)
}

/// The mean of every sequence: `[tokens] -> [sequences]`.
pub(super) fn means(values: Tensor<1>, lens: &[usize]) -> Tensor<1> {
    let counts = counts(lens, &values);
    sums(values, lens) / counts
}

/// The value of its sequence for every token: `[sequences] -> [tokens]`. Its gradient is [`sums`].
pub(super) fn spread(sequences: Tensor<1>, lens: &[usize]) -> Tensor<1> {
    let owners = owners(lens, &sequences.device());
    sequences.select(0, owners)
}

/// The lengths as numbers beside `like`.
pub(super) fn counts(lens: &[usize], like: &Tensor<1>) -> Tensor<1> {
    host(lens.iter().map(|len| *len as f64).collect(), like)
}

/// Numbers of the host as a constant on the device of `like`, in its dtype.
pub(super) fn host(values: Vec<f64>, like: &Tensor<1>) -> Tensor<1> {
    let len = values.len();
    let data = TensorData::new(values, [len]);
    Tensor::from_data(data, (&like.device(), like.dtype()))
}

/// Refuses lengths that are not those of `expected`, and names the first sequence that differs.
pub(super) fn same_lens(name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found.len() != expected.len() {
        return Err(PeftError::config(
            format!("sequences of `{name}`"),
            found.len(),
            format!("the {} of the policy", expected.len()),
        ));
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(row) => Err(PeftError::config(
            format!("tokens of sequence {row} of `{name}`"),
            found[row],
            format!("the {} of the policy", expected[row]),
        )),
    }
}

/// Refuses another count of values than one for each of `expected` sequences.
pub(super) fn same_count(name: &str, found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(PeftError::Shape {
            tensor: name.into(),
            expected: vec![expected],
            found: vec![found],
        }),
    }
}

/// Refuses a sequence without tokens, and a batch without sequences.
pub(super) fn check_lens(lens: &[usize], values: usize) -> Result<()> {
    if lens.is_empty() {
        return Err(PeftError::config("sequences", 0, "at least one"));
    }
    if let Some(row) = lens.iter().position(|len| *len == 0) {
        return Err(PeftError::config(
            format!("tokens of sequence {row}"),
            0,
            "at least one: an empty completion has no probability to learn from, so leave its row out",
        ));
    }
    same_count("values", values, lens.iter().sum())
}

/// Refuses a number that is not finite, and names its row.
pub(super) fn finite(name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(row) => Err(PeftError::config(
            format!("{name}[{row}]"),
            values[row],
            "a finite number: leave the row out, or give it a value",
        )),
    }
}
