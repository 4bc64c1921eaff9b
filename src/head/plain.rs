//! The same with all logits in memory, by Burn's tensors: for backends that this crate was not built for, and where an adapter makes the logits
//! as a whole.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};

use super::{Head, HeadWeight, Options, rows, wide};
use crate::tensor::{cast, constant, matmul};

/// Below any logarithm of a positive probability. Times a probability of zero it is zero, which −∞ is not.
const LEAST_LOG: f64 = -1e4;

/// `x·W + u·B + b`, `[rows, vocabulary]`.
pub(super) fn logits(x: Tensor<2>, head: Head) -> Tensor<2> {
    let wide = wide(&x);
    let z = match head.weight {
        HeadWeight::Nf4(weight) => weight.matmul(x),
        HeadWeight::Dense(weight) => match weight.dtype() == x.dtype() {
            true => matmul(x, weight),
            false => matmul(cast(x, wide), cast(weight, wide)),
        },
    };
    let mut z = cast(z, wide);
    if let Some([u, b]) = head.low_rank {
        z = z + matmul(u, b);
    }
    match head.bias {
        Some(bias) => z + bias.unsqueeze(),
        None => z,
    }
}

/// The [`rows`] of logits `[rows, vocabulary]`: `[k, rows]`, in f32 (f64 for f64 logits).
pub(crate) fn of_logits(logits: Tensor<2>, labels: Vec<usize>, options: &Options) -> Tensor<2> {
    let dtype = wide(&logits);
    let logits = cast(logits, dtype) / options.temperature;
    let labels: Vec<i64> = labels.into_iter().map(|label| label as i64).collect();
    let data = TensorData::new(labels, [logits.dims()[0], 1]);
    let labels = Tensor::<2, Int>::from_data(data, &logits.device());
    let log_p = log_softmax(logits.clone(), 1);
    let own = log_p.clone().gather(1, labels.clone());
    let nothing = constant(own.clone()).zeros_like();
    let mut columns = vec![nothing; rows::count(options.statistics)];
    if options.statistics {
        let finite = log_p.clone().clamp_min(LEAST_LOG);
        let entropy = (log_p.clone().exp() * finite).sum_dim(1).neg();
        let fixed = constant(log_p.clone());
        columns[rows::LOG_SUM_SQ] = (fixed.clone() * 2.0).exp().sum_dim(1).log();
        let largest = fixed.clone().max_dim(1);
        columns[rows::IS_TOP] = cast(fixed.gather(1, labels).equal(largest).float(), dtype);
        columns[rows::ENTROPY] = entropy;
        columns[rows::MEAN] = log_p.mean_dim(1);
    }
    columns[rows::LOG_PROB] = own;
    Tensor::cat(columns, 1).transpose()
}
