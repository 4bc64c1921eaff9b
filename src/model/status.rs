//! The state of a model in the words of PEFT: `print_trainable_parameters`, `get_model_status` and `get_layer_status`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use burn::module::Module;

use super::peft_model::PeftModel;
use super::report::{AdapterReport, ModelReport, WeightReport};
use super::target::TargetModules;
use super::traverse::Site;

/// Most paths that a line of [`ModelStatus`] shows; its fields hold all of them.
const SHOWN: usize = 8;

/// A property of several parts: the same for all, or PEFT's `"irregular"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regular<T> {
    /// All parts have this value.
    All(T),
    /// Some parts differ from others.
    Irregular,
}

impl<T: PartialEq + Copy> Regular<T> {
    /// The common value; `None` for no values.
    fn of(values: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut values = values.into_iter();
        let first = values.next()?;
        match values.all(|value| value == first) {
            true => Some(first),
            false => Some(Self::Irregular),
        }
    }
}

impl fmt::Display for Regular<bool> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::All(value) => value.fmt(f),
            Self::Irregular => f.write_str("irregular"),
        }
    }
}

/// The state of one adapted parameter, as a row of PEFT's `get_layer_status`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerStatus {
    /// Path of the module, or of the parameter where it is not called `weight`.
    pub name: String,
    /// Whether adapters are enabled.
    pub enabled: bool,
    /// The adapters that the parameter uses while adapters are enabled.
    pub active_adapters: Vec<String>,
    /// Whether the parameters of each adapter require a gradient.
    pub requires_grad: BTreeMap<String, Regular<bool>>,
    /// The adapters that the parameter has.
    pub available_adapters: Vec<String>,
    /// The devices of each adapter.
    pub devices: BTreeMap<String, String>,
}

/// The state of a whole model, as PEFT's `get_model_status` gives it, and what a PEFT user would not expect.
///
/// ```
/// # use burn::nn::{Linear, LinearConfig};
/// # use burn::prelude::*;
/// # use burn_peft::prelude::*;
/// # fn main() -> burn_peft::Result<()> {
/// # let layers: Vec<Linear> = vec![LinearConfig::new(8, 8).init(&Device::default())];
/// let mut model = PeftModel::new(layers);
/// model.add_adapter("default", &PeftConfig::new(LoraConfig::new(2), TargetConfig::all_linear()))?;
/// assert_eq!(
///     model.status().trainable_parameters(),
///     "trainable params: 32 || all params: 104 || trainable%: 30.7692"
/// );
/// println!("{}", model.status());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelStatus {
    /// The parameters that require a gradient.
    pub trainable_params: usize,
    /// All parameters, adapters included. A packed weight counts as the dense one that it stands for, as in PEFT.
    pub total_params: usize,
    /// How many parameters have an adapter. PEFT counts layers, and counts a module that is saved whole as one.
    pub num_adapter_layers: usize,
    /// Whether adapters are enabled.
    pub enabled: bool,
    /// The adapters in use while adapters are enabled.
    pub active_adapters: Vec<String>,
    /// The adapters that the model has, in the order of their names.
    pub available_adapters: Vec<String>,
    /// Whether the parameters of each adapter require a gradient.
    pub requires_grad: BTreeMap<String, Regular<bool>>,
    /// The devices of each adapter.
    pub devices: BTreeMap<String, Vec<String>>,
    /// One row per adapted parameter, in the model's order.
    pub layers: Vec<LayerStatus>,
    /// Modules that no adapter has although an adapter's targets are `"all-linear"`, with the reason.
    pub left_out: Vec<(String, String)>,
    /// Linear layers that stayed dense in a model whose other layers are packed.
    pub dense: Vec<String>,
    /// Layers that a forward pass has composed densely, because their call sites say `forward` and not `forward_peft`.
    pub composed: Vec<String>,
}

impl<M: Module> PeftModel<M> {
    /// The state of the model in the words of PEFT's `get_model_status` and `get_layer_status`.
    pub fn status(&self) -> ModelStatus {
        let sites = self.sites();
        let linear = sites.iter().filter(|site| site.is_linear());
        let packed = linear.clone().any(|site| site.nf4().is_some());
        let dense = linear.clone().filter(|site| packed && site.nf4().is_none());
        let dense = dense.map(|site| site.module().to_owned()).collect();
        let left_out = self.left_out(&sites);
        let mut available: Vec<String> = self.adapters().map(str::to_owned).collect();
        available.sort();
        ModelStatus::new(&self.report(), available, left_out, dense)
    }

    /// Prints PEFT's line of trainable parameters: see [`ModelStatus::trainable_parameters`].
    pub fn print_trainable_parameters(&self) {
        println!("{}", self.status().trainable_parameters());
    }

    /// The output head, if an adapter for all linear layers has left it out.
    fn left_out(&self, sites: &[Site]) -> Vec<(String, String)> {
        let all_linear = self.adapters().any(|name| {
            let config = self.config(name);
            config.is_ok_and(|config| config.targets.target_modules == TargetModules::AllLinear)
        });
        let Some(head) = self.head_of(sites) else {
            return Vec::new();
        };
        let is_bare = |site: &Site| {
            let state = site.state.as_ref();
            site.module() == head && state.is_none_or(|state| state.adapters.is_empty())
        };
        match all_linear && sites.iter().any(is_bare) {
            false => Vec::new(),
            true => vec![(
                head.to_owned(),
                "the output head: `all-linear` leaves it out, as PEFT does. `target_modules` can name it, `modules_to_save` trains it whole, \
                 `PeftModel::with_head` names another head"
                    .into(),
            )],
        }
    }
}

impl ModelStatus {
    fn new(
        report: &ModelReport,
        available_adapters: Vec<String>,
        left_out: Vec<(String, String)>,
        dense: Vec<String>,
    ) -> Self {
        let adapted = report.weights.iter();
        let adapted = adapted.filter(|weight| !weight.adapters.is_empty());
        let layers: Vec<_> = adapted
            .map(|weight| LayerStatus::new(weight, report.enabled))
            .collect();
        let of_layers = |name: &String| {
            let rows = layers.iter();
            let status = rows.filter_map(|layer| layer.requires_grad.get(name).copied());
            Some((name.clone(), Regular::of(status)?))
        };
        let devices = |name: &String| {
            let rows = layers.iter();
            let devices: BTreeSet<_> = rows.filter_map(|layer| layer.devices.get(name)).collect();
            (name.clone(), devices.into_iter().cloned().collect())
        };
        Self {
            trainable_params: report.trainable_params,
            total_params: report.total_params,
            num_adapter_layers: layers.len(),
            enabled: report.enabled,
            active_adapters: report
                .active
                .names()
                .into_iter()
                .map(String::from)
                .collect(),
            requires_grad: available_adapters.iter().filter_map(of_layers).collect(),
            devices: available_adapters.iter().map(devices).collect(),
            available_adapters,
            left_out,
            dense,
            composed: report.composed().map(String::from).collect(),
            layers,
        }
    }

    /// The line that PEFT's `print_trainable_parameters` prints, character by character.
    pub fn trainable_parameters(&self) -> String {
        let percent = 100.0 * self.trainable_params as f64 / self.total_params.max(1) as f64;
        format!(
            "trainable params: {} || all params: {} || trainable%: {percent:.4}",
            grouped(self.trainable_params),
            grouped(self.total_params)
        )
    }
}

impl LayerStatus {
    fn new(weight: &WeightReport, enabled: bool) -> Self {
        let names = |keep: fn(&AdapterReport) -> bool| {
            let adapters = weight.adapters.iter().filter(|adapter| keep(adapter));
            adapters.map(|adapter| adapter.name.clone()).collect()
        };
        // A parameter may have several changes of one adapter.
        let mut requires_grad = BTreeMap::new();
        for AdapterReport {
            name,
            requires_grad: trains,
            ..
        } in &weight.adapters
        {
            let trains = trains.map_or(Regular::Irregular, Regular::All);
            let known = requires_grad.entry(name.clone()).or_insert(trains);
            if *known != trains {
                *known = Regular::Irregular;
            }
        }
        let devices = weight.adapters.iter();
        let devices =
            devices.map(|adapter| (adapter.name.clone(), format!("{:?}", adapter.device)));
        Self {
            name: weight.path.clone(),
            enabled,
            active_adapters: names(|adapter| adapter.active),
            requires_grad,
            available_adapters: names(|_| true),
            devices: devices.collect(),
        }
    }
}

/// PEFT's line, the fields of `get_model_status`, and a line for each thing a PEFT user would not expect.
impl fmt::Display for ModelStatus {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let grads = self.requires_grad.iter();
        let grads = grads.map(|(name, value)| format!("{name}: {value}"));
        writeln!(f, "{}", self.trainable_parameters())?;
        write!(
            f,
            "adapters enabled: {}; active: {}; available: {}; requires_grad: {}; adapted parameters: {}",
            self.enabled,
            or_none(self.active_adapters.iter().cloned()),
            or_none(self.available_adapters.iter().cloned()),
            or_none(grads),
            self.num_adapter_layers
        )?;
        for (path, reason) in &self.left_out {
            write!(f, "\nno adapter: `{path}`, {reason}")?;
        }
        if !self.dense.is_empty() {
            write!(f, "\nnot packed: {}", some(&self.dense))?;
        }
        if !self.composed.is_empty() {
            write!(
                f,
                "\ncomposed densely: {}. Call `forward_peft` there in place of `forward`: it takes less memory and applies dropout",
                some(&self.composed)
            )?;
        }
        Ok(())
    }
}

fn or_none(names: impl Iterator<Item = String>) -> String {
    let names: Vec<_> = names.collect();
    match names.is_empty() {
        true => "none".into(),
        false => names.join(", "),
    }
}

/// The first paths, and how many more there are.
fn some(paths: &[String]) -> String {
    let shown: Vec<_> = paths
        .iter()
        .take(SHOWN)
        .map(|path| format!("`{path}`"))
        .collect();
    match paths.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// A number with commas between groups of three digits, as Python's `{:,}`.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::{PeftConfig, TargetConfig};
    use crate::nf4::Nf4Config;

    /// The model of `get_model_status` in the golden values below, which PEFT 0.21.2 printed.
    #[derive(Module, Debug)]
    struct Mlp {
        up: Linear,
        down: Linear,
        lm_head: Linear,
    }

    fn mlp() -> Mlp {
        let device = Device::default().autodiff();
        let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).init(&device);
        Mlp {
            up: linear(64, 128),
            down: linear(128, 8),
            lm_head: linear(8, 8),
        }
    }

    fn config(targets: &[&str]) -> PeftConfig {
        PeftConfig::new(
            LoraConfig::new(4),
            TargetConfig::list(targets.iter().copied()),
        )
    }

    #[test]
    fn numbers_are_grouped_as_python_groups_them() {
        let cases = [
            (0, "0"),
            (12, "12"),
            (123, "123"),
            (1234, "1,234"),
            (123_456, "123,456"),
            (1_234_567, "1,234,567"),
        ];
        for (number, expected) in cases {
            assert_eq!(grouped(number), expected);
        }
    }

    /// PEFT: `get_peft_model(M(), LoraConfig(r=4, target_modules=["up", "down"]))` with an `nn.Linear(8, 8)` called `lm_head`.
    #[test]
    fn the_status_is_that_of_peft() {
        let mut model = PeftModel::new(mlp());
        model
            .add_adapter("default", &config(&["up", "down"]))
            .unwrap();
        let status = model.status();
        assert_eq!(
            status.trainable_parameters(),
            "trainable params: 1,312 || all params: 10,736 || trainable%: 12.2206"
        );
        assert_eq!(status.num_adapter_layers, 2);
        assert!(status.enabled);
        assert_eq!(status.active_adapters, ["default"]);
        assert_eq!(status.available_adapters, ["default"]);
        assert_eq!(status.requires_grad["default"], Regular::All(true));
        assert_eq!(status.devices["default"].len(), 1);
        let names: Vec<_> = status.layers.iter().map(|layer| &*layer.name).collect();
        assert_eq!(names, ["up", "down"]);
        assert_eq!(status.layers[0].active_adapters, ["default"]);
        // A list of targets leaves nothing out by itself.
        assert_eq!(status.left_out, []);
        assert_eq!(status.dense, Vec::<String>::new());

        model.disable_adapters();
        assert!(!model.status().enabled);
    }

    #[test]
    fn a_layer_has_only_the_adapters_that_target_it() {
        let mut model = PeftModel::new(mlp());
        model
            .add_adapter("default", &config(&["up", "down"]))
            .unwrap();
        model.add_adapter("b", &config(&["up"])).unwrap();
        model.set_adapter("default").unwrap();
        let status = model.status();
        assert_eq!(status.available_adapters, ["b", "default"]);
        assert_eq!(status.requires_grad["default"], Regular::All(true));
        assert_eq!(status.requires_grad["b"], Regular::All(false));
        assert_eq!(status.layers[0].available_adapters, ["default", "b"]);
        assert_eq!(status.layers[1].available_adapters, ["default"]);
    }

    #[test]
    fn what_was_left_out_stayed_dense_or_was_composed_is_said() {
        let mut model = PeftModel::new(mlp());
        model
            .quantize_nf4(&TargetConfig::list(["up"]), &Nf4Config::new())
            .unwrap();
        let config = PeftConfig::new(LoraConfig::new(4), TargetConfig::all_linear());
        model.add_adapter("default", &config).unwrap();
        let x = burn::tensor::Tensor::<2>::zeros([1, 64], &Device::default().autodiff());
        model.up.forward(x);
        let status = model.status();
        assert_eq!(status.dense, ["down", "lm_head"]);
        assert_eq!(status.composed, ["up"]);
        assert_eq!(status.left_out.len(), 1);
        let text = status.to_string();
        for part in [
            "no adapter: `lm_head`, the output head",
            "not packed: `down`, `lm_head`",
            "composed densely: `up`. Call `forward_peft`",
            "requires_grad: default: true",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_model_without_adapters_has_none() {
        let text = PeftModel::new(mlp()).status().to_string();
        assert!(
            text.contains("active: none; available: none; requires_grad: none"),
            "{text}"
        );
    }

    #[test]
    fn long_lists_are_cut() {
        let paths: Vec<String> = (0..10).map(|i| format!("l{i}")).collect();
        assert!(some(&paths).ends_with("`l7` and 2 more"));
    }
}
