//! The base of a model as it is stored, dense or packed, for whoever writes it to a file.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};

use super::peft_model::{Parameter, PeftModel, refuse_foreign};
use super::traverse::{See, as_matrix, walk};
use crate::Result;
use crate::nf4::Nf4Weight;

/// A parameter of the base.
pub(crate) struct StoredParameter {
    /// Where it is, and what.
    pub parameter: Parameter,
    /// Its value, of which tensors are shared with the model.
    pub value: StoredValue,
}

/// The value of a parameter of the base.
pub(crate) enum StoredValue {
    /// Dense, in Burn's layout: the first axis, and all others as one; of a vector, one row.
    Dense(Tensor<2>),
    /// Packed in NF4, and the dtype of the dense weight it stands for.
    Nf4(Nf4Weight, FloatDType),
}

impl<M: Module> PeftModel<M> {
    /// Every float parameter of the base and every running statistic, in the model's order, as it is without adapters. What was not
    /// initialised is.
    ///
    /// # Errors
    ///
    /// [`PeftError::ForeignReparameterization`](crate::PeftError::ForeignReparameterization), whose value may be anything.
    pub(crate) fn stored_base(&self) -> Result<Vec<StoredParameter>> {
        self.settle_statistics();
        let sites = self.sites();
        for site in &sites {
            refuse_foreign(site)?;
        }
        let parameters = self.parameters_of(&sites);
        let mut dense = Dense::default();
        walk(self.module(), &mut dense);
        let sites = sites.into_iter().zip(parameters).zip(dense.values);
        Ok(sites
            .map(|((site, parameter), tensor)| StoredParameter {
                parameter,
                value: match site.state.and_then(|state| Some((state.nf4?, state.dtype))) {
                    Some((nf4, dtype)) => StoredValue::Nf4(nf4, dtype),
                    None => StoredValue::Dense(tensor),
                },
            })
            .collect())
    }
}

/// Collects stored values.
#[derive(Default)]
struct Dense {
    values: Vec<Tensor<2>>,
}

impl See for Dense {
    fn see<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
        let matrix = match D {
            // Reshaping what is a transposed view would copy it.
            2 => as_matrix(param).base().without_autodiff(),
            _ => {
                let base = param.base().without_autodiff();
                let rows = if D == 1 { 1 } else { base.dims()[0] };
                let columns = base.shape().num_elements().checked_div(rows);
                base.reshape([rows, columns.unwrap_or(0)])
            }
        };
        self.values.push(matrix);
    }
}
