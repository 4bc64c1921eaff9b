//! Another number of tokens: rows of the input embedding and outputs of the head are added or left out at the end.

use std::collections::HashMap;
use std::fmt;

use burn::module::{Module, Param};
use burn::tensor::{DType, FloatDType, Tensor, TensorData};

use super::base::{NewBase, replace_bases};
use super::new_rows::{NewRows, Table};
use super::peft_model::{PeftModel, refuse_foreign};
use super::tied::TiedPart;
use super::traverse::{See, Site, as_matrix, collect, edit, walk};
use super::vocabulary::{TokenLayer, found, input_embedding, output_head};
use super::weight::NamedChange;
use crate::adapter::{Change, cast};
use crate::layer::{LayerKind, loader_transposes};
use crate::{PeftError, Result};

/// What [`resize_vocabulary`](PeftModel::resize_vocabulary) has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResizeReport {
    /// The tables of tokens.
    pub tables: Vec<ResizedTable>,
}

/// A table that has another number of rows now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResizedTable {
    /// Path of its parameter.
    pub path: String,
    /// Its rows before.
    pub from: usize,
    /// Its rows now.
    pub to: usize,
    /// The adapters that change it and were resized with it.
    pub adapters: Vec<String>,
}

impl fmt::Display for ResizeReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (place, table) in self.tables.iter().enumerate() {
            let ResizedTable {
                path,
                from,
                to,
                adapters,
            } = table;
            let separator = if place == 0 { "" } else { "; " };
            write!(f, "{separator}`{path}`: {from} to {to} tokens")?;
            if !adapters.is_empty() {
                write!(f, ", with the adapters {adapters:?}")?;
            }
        }
        Ok(())
    }
}

impl<M: Module> PeftModel<M> {
    /// Gives the model a vocabulary of `tokens` tokens: rows of the input embedding, and outputs of the head with their biases, are
    /// left out at the end or added by `new_rows`, as `resize_token_embeddings` of transformers does. A head that is the embedding
    /// needs nothing of its own.
    ///
    /// The input embedding is the only one of the model, or the one of a usual name (`embed_tokens`, `wte`, ...), or the one with the
    /// most rows; the head is found as [`with_head`](Self::with_head) says. [`resize_rows`](Self::resize_rows) is for other tables.
    ///
    /// Adapters follow: of new tokens a low-rank change is zero, and a saved copy has the base's rows. What a model's own code knows
    /// of its vocabulary, a field of its size for instance, it must change itself.
    ///
    /// # Memory
    ///
    /// Of one table at a time, the old rows on the host in f32 and the new table on the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] if `tokens` is 0, if it is not clear which embedding is the input's, for a table that is packed or in a
    /// quantisation of Burn's, for an adapter with trained tokens beyond the new end, with DoRA on an embedding, or on slices;
    /// [`PeftError::ForeignReparameterization`]; [`PeftError::DeviceRead`]. The model has not changed then.
    pub fn resize_vocabulary(&mut self, tokens: usize, new_rows: &NewRows) -> Result<ResizeReport> {
        let sites = collect(self.module());
        let layers: Vec<TokenLayer> = sites.iter().filter_map(Site::token_layer).collect();
        let embedding = input_embedding(&layers).map_err(|embeddings| {
            PeftError::config(
                "resize_vocabulary",
                format!("a model with {}", found(&embeddings)),
                "a model whose input embedding is clear; `resize_rows` takes the path of a table",
            )
        })?;
        let head = output_head(&layers, self.named_head());
        let modules = [Some(embedding.module), head].into_iter().flatten();
        let modules: Vec<String> = modules.map(str::to_owned).collect();
        self.resize(&sites, &modules, tokens, new_rows)
    }

    /// Gives the table of tokens at `module`, an embedding or a linear head with its bias, `tokens` rows, as
    /// [`resize_vocabulary`](Self::resize_vocabulary) does.
    ///
    /// # Errors
    ///
    /// As there, and [`PeftError::UnknownModule`] for a path at which there is neither an embedding nor a linear layer.
    pub fn resize_rows(
        &mut self,
        module: &str,
        tokens: usize,
        new_rows: &NewRows,
    ) -> Result<ResizeReport> {
        let sites = collect(self.module());
        self.resize(&sites, &[module.to_owned()], tokens, new_rows)
    }

    fn resize(
        &mut self,
        sites: &[Site],
        modules: &[String],
        tokens: usize,
        new_rows: &NewRows,
    ) -> Result<ResizeReport> {
        if tokens == 0 {
            return Err(PeftError::config("tokens", 0, "at least one token"));
        }
        let mut tables = Vec::new();
        for module in modules {
            let weight = sites.iter().find(|site| {
                let layer = site.token_layer();
                layer.is_some_and(|layer| layer.module == module)
            });
            let weight = weight.ok_or_else(|| PeftError::UnknownModule {
                path: module.clone(),
            })?;
            check(weight, tokens)?;
            tables.push(weight);
            if weight.layer == Some(LayerKind::Linear) {
                let path = weight
                    .path
                    .strip_suffix("weight")
                    .map(|path| format!("{path}bias"));
                let bias = sites.iter().find(|site| Some(&site.path) == path.as_ref());
                if let Some(bias) = bias {
                    check(bias, tokens)?;
                    tables.push(bias);
                }
            }
        }
        tables.retain(|site| rows(site) != tokens);
        let mut values = Values::default();
        for site in &tables {
            values.wanted.insert(site.path.clone(), is_head(site));
        }
        walk(self.module(), &mut values);
        let (mut bases, mut states) = (HashMap::new(), HashMap::new());
        let mut report = ResizeReport { tables: Vec::new() };
        for site in tables {
            let old = values.found.remove(&site.path);
            let old = old.expect("a parameter of the model");
            let new = old.new_rows(&site.path, tokens, new_rows)?;
            let mut adapters = Vec::new();
            if let Some(mut state) = site.state.clone() {
                for NamedChange {
                    name, change, part, ..
                } in &mut state.adapters
                {
                    let turned = *part == TiedPart::Head;
                    *change = new.change(change, tokens, &old, turned);
                    if !adapters.contains(name) {
                        adapters.push(name.clone());
                    }
                }
                states.insert(site.path.clone(), state);
            }
            report.tables.push(ResizedTable {
                path: site.path.clone(),
                from: rows(site),
                to: tokens,
                adapters,
            });
            bases.insert(site.path.clone(), old.into_base(tokens, &new));
        }
        let module = self.module.take().expect("only empty inside an operation");
        self.module = Some(edit(replace_bases(module, bases), states));
        Ok(report)
    }
}

/// Whether a token is a column of the weight.
fn is_head(site: &Site) -> bool {
    site.layer == Some(LayerKind::Linear)
}

/// How many tokens a table has.
fn rows(site: &Site) -> usize {
    site.shape[usize::from(is_head(site))]
}

/// Checks that a table may have so many rows.
fn check(site: &Site, tokens: usize) -> Result<()> {
    refuse_foreign(site)?;
    let refused = |found: String, expected: &str| {
        let name = format!("tokens of `{}`", site.path);
        Err(PeftError::config(name, found, expected))
    };
    if site.nf4().is_some() {
        return refused(
            "a table that is packed in NF4".into(),
            "a dense one: resize before `quantize_nf4`, or load with `BaseOptions::with_resized_vocabulary`",
        );
    }
    if let Some(DType::QFloat(_)) = site.dtype {
        return refused(
            "a table in a quantisation of Burn's".into(),
            "one of floats",
        );
    }
    for own in site.state.iter().flat_map(|state| &state.adapters) {
        let NamedChange {
            name, change, part, ..
        } = own;
        match change {
            Change::Lora(lora) => {
                let is_head = is_head(site) || *part == TiedPart::Head;
                if let Some(why) = lora.fixed_rows(is_head) {
                    return refused(
                        format!("those of adapter `{name}`: {why}"),
                        "an adapter that can follow: delete this one, or resize before it is added",
                    );
                }
            }
            Change::Rows(rows) => {
                if let Some(token) = rows.indices().iter().find(|token| **token >= tokens) {
                    return refused(
                        format!("{tokens}, and adapter `{name}` trains token {token}"),
                        "more than every trained token",
                    );
                }
            }
            Change::Copy(_) => {}
        }
    }
    Ok(())
}

/// Collects the values of parameters.
#[derive(Default)]
struct Values {
    /// Paths, and whether a token is a column there.
    wanted: HashMap<String, bool>,
    found: HashMap<String, Old>,
}

/// A table as it is, a matrix; that of a bias has one column.
struct Old {
    values: Tensor<2>,
    /// Whether a token is a column: that of a linear head.
    is_head: bool,
    is_bias: bool,
    loader_transposes: bool,
}

impl See for Values {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let Some(&is_head) = self.wanted.get(path) else {
            return;
        };
        let old = match D {
            2 => {
                let matrix = as_matrix(param);
                Old {
                    values: matrix.base().without_autodiff(),
                    is_head,
                    is_bias: false,
                    loader_transposes: is_head && loader_transposes(&matrix),
                }
            }
            _ => {
                let values = param.base().without_autodiff();
                let count = values.shape().num_elements();
                Old {
                    values: values.reshape([count, 1]),
                    is_head: false,
                    is_bias: true,
                    loader_transposes: false,
                }
            }
        };
        self.found.insert(path.to_owned(), old);
    }
}

/// The rows that a table gains, `[added, columns]`.
struct New(Option<Tensor<2>>);

impl Old {
    /// # Errors
    ///
    /// [`PeftError::DeviceRead`].
    fn new_rows(&self, path: &str, tokens: usize, new_rows: &NewRows) -> Result<New> {
        let mut dims = self.values.dims();
        if self.is_head {
            dims.reverse();
        }
        let [rows, columns] = dims;
        let Some(added) = tokens.checked_sub(rows).filter(|added| *added > 0) else {
            return Ok(New(None));
        };
        let data = self.values.clone().try_into_data();
        let data = data.map_err(|error| PeftError::DeviceRead {
            tensor: path.to_owned(),
            reason: error.to_string(),
        })?;
        let old: Vec<f32> = data.iter::<f32>().collect();
        drop(data);
        let row = |index: usize, out: &mut [f32]| {
            for (column, out) in out.iter_mut().enumerate() {
                *out = match self.is_head {
                    true => old[column * rows + index],
                    false => old[index * columns + column],
                };
            }
        };
        let table = Table {
            name: path,
            rows,
            columns,
            row: &row,
            is_bias: self.is_bias,
        };
        let new = new_rows.draw(&table, added);
        let (device, dtype) = (self.values.device(), self.values.dtype());
        let new = TensorData::new(new, [added, columns]).convert_dtype(dtype);
        Ok(New(Some(Tensor::from_data(new, (&device, dtype)))))
    }

    /// The matrix with the new rows, or without the last ones.
    fn with(&self, values: Tensor<2>, tokens: usize, new: &New) -> Tensor<2> {
        let axis = usize::from(self.is_head);
        match &new.0 {
            None => values.narrow(axis, 0, tokens),
            Some(new) => {
                let new = cast(
                    new.clone().to_device(&values.device()),
                    values.dtype().into(),
                );
                let new = match self.is_head {
                    true => new.transpose(),
                    false => new,
                };
                Tensor::cat(vec![values, new], axis)
            }
        }
    }

    fn into_base(self, tokens: usize, new: &New) -> NewBase {
        let mut values = self.with(self.values.clone(), tokens, new);
        if self.loader_transposes {
            values = values.transpose();
        }
        let shape = match self.is_bias {
            true => vec![tokens],
            false => values.dims().to_vec(),
        };
        let count = values.shape().num_elements();
        NewBase::Dense(values.reshape([count]), shape)
    }
}

impl New {
    /// A change of the table that `old` was, of one with these rows. `turned`: it is a change of the transposed table, of an output head
    /// that shares an embedding's weight.
    fn change(&self, change: &Change, tokens: usize, old: &Old, turned: bool) -> Change {
        match change {
            Change::Lora(lora) => {
                let norms = self.0.as_ref().map(|new| {
                    let new = cast(new.clone(), FloatDType::F32);
                    let [added, _] = new.dims();
                    new.square().sum_dim(1).sqrt().reshape([added])
                });
                let lora = lora.clone();
                lora.with_table_rows(tokens, old.is_head || turned, norms)
                    .into()
            }
            // Of a new token it has what the base has.
            Change::Copy(copy) if old.is_bias => {
                let values: Tensor<1> = copy.value();
                let [count] = values.dims();
                let value = old.with(values.detach().reshape([count, 1]), tokens, self);
                copy.with_value(value.reshape([tokens])).into()
            }
            Change::Copy(copy) => {
                let turn = |value: Tensor<2>| match turned {
                    true => value.transpose(),
                    false => value,
                };
                let value = turn(copy.value::<2>().detach());
                let value = turn(old.with(value, tokens, self));
                copy.with_value(value).into()
            }
            Change::Rows(rows) => rows.clone().into(),
        }
    }
}
