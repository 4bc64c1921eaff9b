//! A case by its name: `subject/dtype/d_in x d_out/tokens/rank`, for instance `qlora/bf16/4096x4096/128/16`.
//!
//! The Python worker reads the same names.

use std::str::FromStr;

use burn::tensor::DType;

/// What is to be run, at which size.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// What is run.
    pub subject: String,
    /// Dtype of the activations, or of what is dequantised.
    pub dtype: DType,
    /// `[d_in, d_out]` of the linear map.
    pub dims: [usize; 2],
    /// Rows of the activations.
    pub tokens: usize,
    /// Rank of the adapter.
    pub rank: usize,
}

impl Case {
    /// A small case of the same kind, if there is one. Run once, it starts threads and loads what libraries load late,
    /// so that the memory of these is not counted as the case's.
    pub fn small(&self) -> Option<Self> {
        let case = Self {
            dims: [256, 256],
            tokens: 16,
            ..self.clone()
        };
        (!self.subject.starts_with("step-")).then_some(case)
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let invalid = || format!("not a case: {name}");
        let fields: Vec<&str> = name.split('/').collect();
        let [subject, dtype, dims, tokens, rank] = fields[..] else {
            return Err(invalid());
        };
        let number = |text: &str| text.parse::<usize>().map_err(|_| invalid());
        let (d_in, d_out) = dims.split_once('x').ok_or_else(invalid)?;
        Ok(Self {
            subject: subject.into(),
            dtype: match dtype {
                "f32" => DType::F32,
                "bf16" => DType::BF16,
                _ => return Err(invalid()),
            },
            dims: [number(d_in)?, number(d_out)?],
            tokens: number(tokens)?,
            rank: number(rank)?,
        })
    }
}
