//! Which parameters of a model the tensors of an adapter are for, and the changes that they are there.

use std::collections::{HashMap, HashSet};

use burn::module::Module;
use burn::tensor::{FloatDType, Tensor, TensorData};

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor};
use super::config::without_base_layers;
use super::elements;
use super::keys::{Factor, parameter_key, rows_key, tensor_key};
use super::names::NameMap;
use super::report::{LoadReport, Mismatch};
use super::shapes::ModuleShape;
use super::sites::check_shape;
use super::tied::TiedHead;
use crate::adapter::{Change, LoraConfig, Slices, TrainedCopy, TrainedRows, ungrown_alpha};
use crate::layer::{LayerKind, WeightLayout};
use crate::model::{
    BiasMode, Parameter, PeftModel, TargetModules, TrainableTokens, is_named, is_statistic,
};
use crate::{PeftError, Result};

/// Values that fit a parameter of the model.
pub(super) struct Fit<'a> {
    /// The parameter.
    pub parameter: Parameter,
    pub values: Values<'a>,
}

/// The values for one parameter.
pub(super) enum Values<'a> {
    /// A low-rank change.
    Lora {
        tensors: &'a LoraTensors,
        rank: usize,
        alpha: f64,
    },
    /// A copy of the whole parameter.
    Copy(&'a ParameterTensor),
    /// Some of its rows.
    Rows {
        tensor: &'a ParameterTensor,
        indices: Vec<usize>,
    },
}

/// The parameters of a model by what a file calls them.
struct Parameters {
    /// The weights that an adapter can change, by their module's path.
    targets: HashMap<String, Parameter>,
    /// Those of them that have a row for each token: embeddings and linear heads.
    matrices: HashMap<String, Parameter>,
    /// All, by their own paths.
    all: HashMap<String, Parameter>,
    /// Tensors of experts with their own paths, in the model's order.
    experts: Vec<(String, Parameter)>,
}

impl Parameters {
    /// A parameter whose module the map cannot name has no name in the file.
    fn of<M: Module>(model: &PeftModel<M>, names: &NameMap) -> Self {
        let mut found = Self {
            targets: HashMap::new(),
            matrices: HashMap::new(),
            all: HashMap::new(),
            experts: Vec::new(),
        };
        // No adapter has running statistics of its own.
        let parameters = model.parameters().into_iter();
        for parameter in parameters.filter(|parameter| !is_statistic(&parameter.path)) {
            let path = match parameter.module() {
                "" => parameter.torch_name.clone(),
                module => match names.to_file(module) {
                    Err(_) => continue,
                    Ok(module) => {
                        if parameter.is_target() {
                            found.targets.insert(module.clone(), parameter.clone());
                        }
                        if let Some(LayerKind::Embedding | LayerKind::Linear) = parameter.layer {
                            found.matrices.insert(module.clone(), parameter.clone());
                        }
                        format!("{module}.{}", parameter.torch_name)
                    }
                },
            };
            if parameter.is_experts() {
                found.experts.push((path.clone(), parameter.clone()));
            }
            found.all.insert(path, parameter);
        }
        found
    }

    /// The tensor of experts that factors under this module path are for: PEFT wraps a module once for each of its tensors, the
    /// first of them innermost.
    fn take_experts(&mut self, path: &str, targets: &[String]) -> Option<Parameter> {
        let (module, depth) = without_base_layers(path);
        let of_module = |path: &str| {
            let named = targets.iter().any(|target| is_named(path, target));
            named && path.rsplit_once('.').is_some_and(|(of, _)| of == module)
        };
        let own = self.experts.iter().filter(|(path, _)| of_module(path));
        let own: Vec<_> = own.collect();
        let place = own.len().checked_sub(depth + 1)?;
        let (path, _) = own[place];
        let (_, parameter) = self.all.remove_entry(&path.clone())?;
        Some(parameter)
    }
}

impl AdapterFile {
    /// Which parameters of the model get what, and what becomes of every tensor.
    pub(super) fn fit<M: Module>(
        &self,
        model: &PeftModel<M>,
        names: &NameMap,
    ) -> Result<(Vec<Fit<'_>>, LoadReport)> {
        let mut report = LoadReport::default();
        let mut parameters = Parameters::of(model, names);
        let tied = TiedHead::of(self);
        let mut fits = self.fit_factors(&mut parameters, &tied, &mut report)?;
        let adapted = self.adapted();
        let adapted = |path: &str| {
            let module = path.rsplit_once('.');
            module.is_some_and(|(module, _)| adapted.contains(module))
        };
        for copy in &self.copies {
            let key = parameter_key(&copy.path, adapted(&copy.path));
            elements::to_file(&key, copy.data.dtype())?;
            let Some(parameter) = parameters.all.remove(&copy.path) else {
                match tied.has_copy(copy) {
                    true => report.loaded.push(key),
                    false => report.unexpected.push(key),
                }
                continue;
            };
            let mut expected = parameter.shape.clone();
            if parameter.is_transposed() {
                expected.reverse();
            }
            if report.judge(check_shape(key, copy.data.shape(), expected)) {
                let values = Values::Copy(copy);
                fits.push(Fit { parameter, values });
            }
        }
        for rows in &self.rows {
            let key = rows_key(&rows.path);
            elements::to_file(&key, rows.data.dtype())?;
            let matrix = parameters.matrices.remove(&rows.path);
            let Some((parameter, indices)) = matrix.zip(self.indices_of(&rows.path)) else {
                report.unexpected.push(key);
                continue;
            };
            let features = parameter.shape[usize::from(!parameter.is_transposed())];
            let expected = vec![indices.len(), features];
            if report.judge(check_shape(key, rows.data.shape(), expected)) {
                let (tensor, indices) = (rows, indices.to_vec());
                let values = Values::Rows { tensor, indices };
                fits.push(Fit { parameter, values });
            }
        }
        self.report_missing(&parameters, adapted, &mut report)?;
        report.missing.sort();
        Ok((fits, report))
    }

    fn fit_factors(
        &self,
        parameters: &mut Parameters,
        tied: &TiedHead,
        report: &mut LoadReport,
    ) -> Result<Vec<Fit<'_>>> {
        let matcher = self.config.validate()?;
        let mut fits = Vec::with_capacity(self.tensors.len());
        for tensors in &self.tensors {
            let path = &tensors.path;
            let found = match tensors.experts {
                true => parameters.take_experts(path, &self.config.target_parameters),
                false => None,
            };
            let found = found.or_else(|| {
                let target = parameters.targets.remove(path)?;
                let is_embedding = target.layer == Some(LayerKind::Embedding);
                (is_embedding == tensors.embedding).then_some(target)
            });
            let Some(parameter) = found else {
                let keys = tensors.iter().map(|(factor, _)| tensor_key(path, factor));
                match tied.has_factors(tensors) {
                    true => report.loaded.extend(keys),
                    false => report.unexpected.extend(keys),
                }
                continue;
            };
            // The patterns see a tensor of experts by its own path.
            let of_experts = format!("{}.{}", without_base_layers(path).0, parameter.torch_name);
            let seen = if parameter.is_experts() {
                &of_experts
            } else {
                path
            };
            let rank = matcher.rank_for(seen, self.config.r)?;
            let alpha = matcher.alpha_for(seen, self.config.lora_alpha)?;
            let shape = parameter.module_shape(&tensors.module_shape());
            let mut fit = true;
            let mut loaded = Vec::new();
            for (factor, data) in tensors.iter() {
                let tensor = tensor_key(path, factor);
                elements::to_file(&tensor, data.dtype())?;
                match check_shape(tensor, data.shape(), shape.shape(factor, rank)) {
                    Ok(tensor) => loaded.push(tensor),
                    Err(mismatch) => {
                        report.mismatched.push(mismatch);
                        fit = false;
                    }
                }
            }
            // Some factors without the others are not put anywhere.
            if fit {
                report.loaded.extend(loaded);
                let values = Values::Lora {
                    tensors,
                    rank,
                    alpha,
                };
                fits.push(Fit { parameter, values });
            }
        }
        Ok(fits)
    }

    /// The paths of the modules that have factors.
    pub(super) fn adapted(&self) -> HashSet<&str> {
        let modules = self.tensors.iter();
        modules.map(|module| module.path.as_str()).collect()
    }

    /// The rows that the configuration has of the embedding at `path`.
    fn indices_of(&self, path: &str) -> Option<&[usize]> {
        match self.config.trainable_token_indices.as_ref()? {
            TrainableTokens::Input(indices) => Some(indices),
            TrainableTokens::Named(named) => {
                let mut named = named.iter();
                let (_, indices) = named.find(|(name, _)| is_named(path, name))?;
                Some(indices)
            }
        }
    }

    /// Reports what the configuration chooses and no tensor is for.
    fn report_missing(
        &self,
        left: &Parameters,
        adapted: impl Fn(&str) -> bool,
        report: &mut LoadReport,
    ) -> Result<()> {
        let config = &self.config;
        let matcher = config.validate()?;
        let saved = |path: &str| {
            let mut modules = path.match_indices('.').map(|(dot, _)| &path[..dot]);
            modules.any(|module| {
                config
                    .modules_to_save
                    .iter()
                    .any(|name| is_named(module, name))
            })
        };
        // "all-linear" may mean fewer modules in Python; PEFT never writes it.
        if config.targets.target_modules != TargetModules::AllLinear {
            for (path, parameter) in &left.targets {
                let file_path = format!("{path}.{}", parameter.torch_name);
                if !saved(&file_path) && matcher.matches(path)? {
                    let embedding = parameter.layer == Some(LayerKind::Embedding);
                    let factors = Factor::of(embedding, config.lora_bias, config.use_dora);
                    let keys = factors.iter().map(|&factor| tensor_key(path, factor));
                    report.missing.extend(keys);
                }
            }
        }
        for (path, parameter) in &left.all {
            let bias = parameter.torch_name == "bias"
                && match config.bias {
                    BiasMode::None => false,
                    BiasMode::All => true,
                    BiasMode::LoraOnly => adapted(path),
                };
            if bias || saved(path) {
                report.missing.push(parameter_key(path, adapted(path)));
            }
        }
        for (path, parameter) in &left.experts {
            let mut named = config.target_parameters.iter();
            // What has found its tensors is no more among all parameters.
            if left.all.contains_key(path) && named.any(|name| is_named(path, name)) {
                let module = path.strip_suffix(&format!(".{}", parameter.torch_name));
                let keys = [Factor::A, Factor::B];
                let module = module.unwrap_or(path);
                report
                    .missing
                    .extend(keys.map(|factor| tensor_key(module, factor)));
            }
        }
        if let (Some(TrainableTokens::Input(_)), true) =
            (&config.trainable_token_indices, self.rows.is_empty())
        {
            report.missing.push(rows_key("the input embedding"));
        }
        Ok(())
    }
}

impl LoadReport {
    /// Notes what became of a tensor, and whether it fits.
    fn judge(&mut self, checked: std::result::Result<String, Mismatch>) -> bool {
        match checked {
            Ok(key) => self.loaded.push(key),
            Err(mismatch) => {
                self.mismatched.push(mismatch);
                return false;
            }
        }
        true
    }
}

impl Parameter {
    /// Whether a file holds it transposed.
    pub(super) fn is_transposed(&self) -> bool {
        self.layer == Some(LayerKind::Linear)
    }

    /// What the shapes of factors for it follow from. A weight does not tell how many groups a convolution has: it has the
    /// channels of one.
    fn module_shape(&self, factors: &ModuleShape) -> ModuleShape {
        let layout = self.layer.map_or(WeightLayout::Matrix, LayerKind::layout);
        let [d_in, d_out] = layout.dims(&self.shape);
        match layout {
            WeightLayout::Matrix => ModuleShape::matrix(d_in, d_out),
            WeightLayout::Experts(_) => {
                let experts = self.shape[0];
                ModuleShape::matrix(d_in, d_out / experts.max(1)).of_experts(experts)
            }
            WeightLayout::Kernel => {
                // Of one group, they are a change of the weight, whatever the convolution is.
                let groups = match &factors.kernel {
                    Some((2.., _)) => self.groups,
                    _ => 1,
                };
                let d_in = self.shape[1].saturating_mul(groups);
                let kernel = Some((groups, self.shape[2..].to_vec()));
                ModuleShape {
                    kernel,
                    ..ModuleShape::matrix(d_in, d_out)
                }
            }
        }
    }

    /// Whether it is the weight of a layer that targets name.
    pub(super) fn is_target(&self) -> bool {
        self.layer.is_some() && !self.is_experts()
    }

    /// Whether it may hold the weights of experts.
    pub(super) fn is_experts(&self) -> bool {
        matches!(self.layer, Some(LayerKind::Experts(_)))
    }
}

impl Fit<'_> {
    /// The values on the parameter's device, in Burn's layout, as an adapter has them.
    pub(super) fn change(&self, config: &LoraConfig, dtype: Option<FloatDType>) -> Result<Change> {
        match &self.values {
            Values::Lora {
                tensors,
                rank,
                alpha,
            } => self.lora(tensors, config, *rank, *alpha, dtype),
            Values::Copy(copy) => {
                let key = parameter_key(&copy.path, false);
                let dtype = self.check_dtype(&key, &copy.data, dtype)?;
                let data = match self.parameter.is_transposed() {
                    true => elements::transposed(&copy.data),
                    false => copy.data.clone(),
                };
                // Flat, as a copy is kept.
                let count = data.num_elements();
                let values: Tensor<1> = self.tensor(elements::reshaped(data, &[count]), dtype);
                Ok(TrainedCopy::of_values(values, self.parameter.shape.clone())?.into())
            }
            Values::Rows { tensor, indices } => {
                let dtype = self.check_dtype(&rows_key(&tensor.path), &tensor.data, dtype)?;
                let rows: Tensor<2> = self.tensor(tensor.data.clone(), dtype);
                let transposed = self.parameter.is_transposed();
                let count = self.parameter.shape[usize::from(transposed)];
                let rows = TrainedRows::with_rows(rows, indices, count)?;
                Ok(match transposed {
                    true => rows.of_head().into(),
                    false => rows.into(),
                })
            }
        }
    }

    fn lora(
        &self,
        tensors: &LoraTensors,
        config: &LoraConfig,
        rank: usize,
        alpha: f64,
        dtype: Option<FloatDType>,
    ) -> Result<Change> {
        let dtype = self.check_dtype(&tensor_key(&tensors.path, Factor::A), &tensors.a, dtype)?;
        // Of a convolution, `[r, channels_in, k_1, …]` is `[r, d_in]`.
        let matrix = |data: &TensorData| {
            if data.rank() == 2 {
                return self.tensor::<2>(elements::transposed(data), dtype);
            }
            let rows = data.shape()[0];
            let columns = data.num_elements() / rows.max(1);
            let data = elements::reshaped(data.clone(), &[rows, columns]);
            self.tensor::<2>(elements::transposed(&data), dtype)
        };
        let vector = |data: &TensorData| {
            let count = data.num_elements();
            self.tensor::<1>(elements::reshaped(data.clone(), &[count]), dtype)
        };
        let mut config = config.clone().with_alpha(alpha);
        config.rank = rank;
        let mut b = matrix(&tensors.b);
        let shape = self.parameter.module_shape(&tensors.module_shape());
        if self.parameter.is_experts() {
            let experts = shape.experts;
            config.slices = Slices::equal(vec![true; experts]);
            // Rank by rank in the file, expert by expert here.
            let by_rank: Tensor<3> = b.reshape([rank, experts, shape.d_out]);
            b = by_rank.reshape([rank, experts * shape.d_out]);
        } else if let Some((groups @ 2.., _)) = shape.kernel {
            // Each group has its share of the features to itself, at the same scale.
            config.slices = Slices::equal(vec![true; groups]);
            config.rank = rank / groups;
            config.alpha = ungrown_alpha(alpha, config.rslora, groups);
        }
        let mut lora = config.with_factors(matrix(&tensors.a), b)?;
        if let Some(bias) = &tensors.bias {
            lora = lora.with_bias(vector(bias))?;
        }
        if let Some(magnitude) = &tensors.magnitude {
            lora = lora.with_magnitude(vector(magnitude))?;
        }
        Ok(lora.into())
    }

    /// The dtype that the values get, if the device has it.
    fn check_dtype(
        &self,
        key: &str,
        data: &TensorData,
        dtype: Option<FloatDType>,
    ) -> Result<FloatDType> {
        let dtype = dtype.unwrap_or_else(|| data.dtype().into());
        match self.parameter.device.supports_dtype(dtype) {
            true => Ok(dtype),
            false => Err(PeftError::DType {
                tensor: key.to_owned(),
                expected: "a type the device has".into(),
                found: format!("{dtype:?}"),
            }),
        }
    }

    fn tensor<const D: usize>(&self, data: TensorData, dtype: FloatDType) -> Tensor<D> {
        let device = &self.parameter.device;
        // They live as long as the model: keep them out of the pools of transient tensors.
        device.memory_persistent_allocations(data, |data| {
            let data = data.convert_dtype(dtype.into());
            Tensor::from_data(data, (device, dtype.into()))
        })
    }
}
