//! What the tests against golden data share.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_peft::objective::{LogProbs, Ragged};
use serde::Deserialize;
use serde_json::Value;

/// Rows of tokens.
pub type Rows = Vec<Vec<f64>>;

/// A file of golden data: one batch for all cases.
#[derive(Deserialize)]
pub struct Golden {
    pub batch: BTreeMap<String, Rows>,
    pub cases: Vec<Case>,
}

/// A loss of TRL.
#[derive(Deserialize)]
pub struct Case {
    pub name: String,
    pub kind: String,
    pub options: BTreeMap<String, Value>,
    #[serde(default)]
    dtype: Option<String>,
    pub loss: f64,
    pub gradients: BTreeMap<String, Rows>,
    pub metrics: BTreeMap<String, f64>,
    /// Rows in place of those of the batch.
    #[serde(default)]
    pub chosen: Option<Rows>,
}

impl Golden {
    pub fn read(text: &str) -> Self {
        serde_json::from_str(text).unwrap()
    }

    pub fn log_probs(&self, name: &str, dtype: DType) -> LogProbs {
        log_probs(&self.batch[name], dtype)
    }
}

impl Case {
    pub fn number(&self, option: &str) -> f64 {
        let value = &self.options[option];
        value
            .as_f64()
            .unwrap_or_else(|| panic!("{}: {option} is {value}", self.name))
    }

    /// None where the option is null.
    pub fn optional(&self, option: &str) -> Option<f64> {
        self.options[option].as_f64()
    }

    pub fn text(&self, option: &str) -> &str {
        self.options[option].as_str().unwrap()
    }

    pub fn flag(&self, option: &str) -> bool {
        self.options[option].as_bool().unwrap()
    }

    pub fn numbers(&self, option: &str) -> Vec<f64> {
        let values = self.options[option].as_array().unwrap();
        values.iter().map(|value| value.as_f64().unwrap()).collect()
    }

    /// How near a value in this dtype must be: that of f32 where TRL itself computes in it.
    pub fn tolerance(&self, dtype: DType) -> f64 {
        match (dtype, self.dtype.as_deref()) {
            (DType::F64, None | Some("float64")) => 1e-10,
            _ => 1e-5,
        }
    }

    #[track_caller]
    pub fn check(&self, what: &str, found: f64, expected: f64, tolerance: f64) {
        let bound = tolerance * expected.abs().max(1.0);
        assert!(
            (found - expected).abs() <= bound,
            "{}, {what}: expected {expected}, found {found}",
            self.name
        );
    }

    /// Metrics are read in f32.
    #[track_caller]
    pub fn check_metric(&self, name: &str, found: f32) {
        self.check(name, f64::from(found), self.metrics[name], 1e-5);
    }

    #[track_caller]
    pub fn check_loss(&self, loss: &Tensor<1>, dtype: DType) {
        self.check("loss", scalar(loss), self.loss, self.tolerance(dtype));
    }

    /// The gradient at a leaf of this name.
    #[track_caller]
    pub fn check_gradient(
        &self,
        name: &str,
        leaf: &Tensor<1>,
        gradients: &burn::tensor::Gradients,
        dtype: DType,
    ) {
        let expected = self.gradients[name].concat();
        let found = match leaf.grad(gradients) {
            Some(found) => values(&found),
            None => vec![0.0; expected.len()],
        };
        assert_eq!(found.len(), expected.len(), "{}", self.name);
        for (token, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let what = format!("gradient of {name} at {token} in {dtype:?}");
            self.check(&what, *found, *expected, self.tolerance(dtype));
        }
    }
}

/// A leaf with a gradient.
pub fn leaf(rows: &Rows, dtype: DType) -> Tensor<1> {
    let values = rows.concat();
    let len = values.len();
    let device = Device::flex().autodiff();
    Tensor::from_data(TensorData::new(values, [len]), (&device, dtype)).require_grad()
}

/// Without autodiff, as the log-probabilities of a reference are.
pub fn constant(rows: &Rows, dtype: DType) -> Tensor<1> {
    let values = rows.concat();
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), (&Device::flex(), dtype))
}

pub fn lens(rows: &Rows) -> Vec<usize> {
    rows.iter().map(Vec::len).collect()
}

pub fn log_probs(rows: &Rows, dtype: DType) -> LogProbs {
    LogProbs::new(constant(rows, dtype), lens(rows)).unwrap()
}

pub fn ragged(rows: &Rows) -> Ragged {
    let rows = rows
        .iter()
        .map(|row| row.iter().map(|x| *x as f32).collect::<Vec<_>>());
    Ragged::from_rows(&rows.collect::<Vec<_>>()).unwrap()
}

pub fn values(x: &Tensor<1>) -> Vec<f64> {
    x.clone().try_into_vec_as::<f64>().unwrap()
}

pub fn scalar(x: &Tensor<1>) -> f64 {
    let values = values(x);
    assert_eq!(values.len(), 1);
    values[0]
}
