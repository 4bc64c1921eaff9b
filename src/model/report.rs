//! What is attached to a model, what of it trains, and what it weighs.

use std::fmt;

use burn::module::Module;
use burn::tensor::{DType, Device, FloatDType};

use super::active::Active;
use super::statistics::is_statistic;
use super::storage::bytes;
use super::target::TargetReport;
use super::traverse::Site;
use super::weight::{NamedChange, Way};
use crate::adapter::Change;

/// The answer to adding an adapter.
#[derive(Clone, Debug)]
pub struct AttachReport {
    /// Which modules got one, and by which pattern.
    pub targets: TargetReport,
    /// The whole model afterwards.
    pub model: ModelReport,
}

impl fmt::Display for AttachReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{} modules matched", self.targets.matched.len())?;
        self.model.fmt(f)
    }
}

/// How the base of a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// A dense tensor; its dtype is unknown until it is initialised.
    Dense(Option<DType>),
    /// Packed in NF4.
    Nf4,
}

/// What an adapter does to a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum ChangeKind {
    /// A low-rank change `s·A·B`.
    Lora {
        /// Rank `r`.
        rank: usize,
        /// The scale `s`.
        scale: f64,
        /// Whether it has DoRA's magnitude.
        dora: bool,
    },
    /// A copy of its own, trained whole.
    Copy,
    /// Rows of its own in an embedding.
    Rows {
        /// How many.
        count: usize,
    },
}

impl fmt::Display for ChangeKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Lora { rank, scale, dora } => {
                let kind = if *dora { "DoRA" } else { "LoRA" };
                write!(f, "{kind} r {rank}, scale {scale:.3}")
            }
            Self::Copy => f.write_str("own copy"),
            Self::Rows { count } => write!(f, "{count} rows"),
        }
    }
}

/// One adapter of one parameter: a row of PEFT's `get_layer_status`, with what it is.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterReport {
    /// Its name.
    pub name: String,
    /// What it does.
    pub kind: ChangeKind,
    /// Whether the parameter uses it while adapters are enabled.
    pub active: bool,
    /// Whether its parameters require a gradient; `None` if only some do.
    pub requires_grad: Option<bool>,
    /// Dtype of its values.
    pub dtype: DType,
    /// Where they lie.
    pub device: Device,
}

impl AdapterReport {
    fn new(adapter: &NamedChange, active: &Active) -> Self {
        let NamedChange { name, change, .. } = adapter;
        let (kind, trained, device) = match change {
            Change::Lora(lora) => {
                let kind = ChangeKind::Lora {
                    rank: lora.rank(),
                    scale: lora.scale(),
                    dora: lora.magnitude.is_some(),
                };
                let vectors = lora.magnitude.iter().chain(&lora.bias);
                let vectors = vectors.map(|vector| vector.val().is_require_grad());
                let factors = [&lora.a, &lora.b].map(|factor| factor.val().is_require_grad());
                let trained: Vec<bool> = factors.into_iter().chain(vectors).collect();
                (kind, trained, lora.a.val().device())
            }
            Change::Copy(copy) => {
                let values = copy.values.val();
                (
                    ChangeKind::Copy,
                    vec![values.is_require_grad()],
                    values.device(),
                )
            }
            Change::Rows(rows) => {
                let count = rows.indices().len();
                let rows = rows.rows.val();
                (
                    ChangeKind::Rows { count },
                    vec![rows.is_require_grad()],
                    rows.device(),
                )
            }
        };
        let all_like = trained.windows(2).all(|pair| pair[0] == pair[1]);
        Self {
            name: name.clone(),
            kind,
            active: active.uses(name),
            requires_grad: all_like.then_some(trained[0]),
            dtype: change.dtype(),
            device,
        }
    }
}

impl fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let active = if self.active { "*" } else { "" };
        let trains = match self.requires_grad {
            Some(true) => "trains",
            Some(false) => "frozen",
            None => "trains in part",
        };
        let Self { name, kind, .. } = self;
        write!(f, "{name}{active} ({kind}, {trains})")
    }
}

/// One parameter that has something attached to it.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightReport {
    /// Path of its module for one called `weight`, else its own.
    pub path: String,
    /// Its shape as a dense one: `[d_in, d_out]` of a linear layer.
    pub shape: Vec<usize>,
    /// How the base is stored.
    pub base: Base,
    /// Its adapters, in the order they were added.
    pub adapters: Vec<AdapterReport>,
    /// How forward passes have read it so far.
    pub way: Way,
}

/// The state of a whole model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelReport {
    /// The adapters in use.
    pub active: Active,
    /// Whether adapters are enabled.
    pub enabled: bool,
    /// Every parameter with something attached, in the model's order.
    pub weights: Vec<WeightReport>,
    /// All parameters, adapters included; an NF4 weight counts as the `d_in · d_out` it stands for.
    pub total_params: usize,
    /// Those that require a gradient.
    pub trainable_params: usize,
    /// Bytes of dense parameters that are no adapter; of uninitialised ones, what they will take in f32.
    pub dense_bytes: usize,
    /// Bytes of packed weights.
    pub nf4_bytes: usize,
    /// Bytes of adapters.
    pub adapter_bytes: usize,
}

impl ModelReport {
    pub(super) fn new(sites: Vec<Site>, active: Active, enabled: bool) -> Self {
        let mut report = Self {
            active,
            enabled,
            weights: Vec::new(),
            total_params: 0,
            trainable_params: 0,
            dense_bytes: 0,
            nf4_bytes: 0,
            adapter_bytes: 0,
        };
        for site in sites {
            if is_statistic(&site.path) {
                report.dense_bytes += bytes(site.dtype, site.shape.iter().product());
                continue;
            }
            let values: usize = site.shape.iter().product();
            report.total_params += values + site.foreign_params;
            if site.trainable {
                report.trainable_params += values;
            }
            match site.nf4() {
                Some(nf4) => report.nf4_bytes += nf4.num_bytes(),
                None => report.dense_bytes += bytes(site.dtype, values),
            }
            let (module, shape) = (site.module().to_owned(), site.shape.clone());
            let Some(state) = site.state else {
                continue;
            };
            for adapter in &state.adapters {
                let params = adapter.change.num_params();
                let dtype = DType::from(FloatDType::from(adapter.change.dtype()));
                report.total_params += params;
                report.adapter_bytes += params * dtype.size();
                if state.trains(adapter) {
                    report.trainable_params += adapter.change.trainable_params();
                }
            }
            report.weights.push(WeightReport {
                path: module,
                shape,
                base: if state.nf4.is_some() {
                    Base::Nf4
                } else {
                    Base::Dense(site.dtype)
                },
                adapters: state
                    .adapters
                    .iter()
                    .map(|adapter| AdapterReport::new(adapter, &state.active))
                    .collect(),
                way: state.way(),
            });
        }
        report
    }

    /// Names of all adapters, in the order in which weights have them.
    pub fn adapters(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for adapter in self.weights.iter().flat_map(|weight| &weight.adapters) {
            if !names.contains(&adapter.name.as_str()) {
                names.push(&adapter.name);
            }
        }
        names
    }

    /// Whether the parameters of the adapter `name` require a gradient; `None` if only some do, or there are none.
    pub fn requires_grad(&self, name: &str) -> Option<bool> {
        let adapters = self.weights.iter().flat_map(|weight| &weight.adapters);
        let mut trained = adapters
            .filter(|adapter| adapter.name == name)
            .map(|adapter| adapter.requires_grad);
        let first = trained.next()??;
        trained.all(|other| other == Some(first)).then_some(first)
    }

    /// A table with a line for each weight: its module, shape and base, its adapters (the active one with a star), and how
    /// it was read.
    pub fn table(&self) -> String {
        let header = ["module", "shape", "base", "read", "adapters"].map(String::from);
        let rows = self.weights.iter().map(|weight| {
            let shape = weight.shape.iter().map(usize::to_string);
            let adapters = weight.adapters.iter().map(ToString::to_string);
            [
                weight.path.clone(),
                shape.collect::<Vec<_>>().join(" x "),
                match weight.base {
                    Base::Nf4 => "NF4".into(),
                    Base::Dense(Some(dtype)) => format!("{dtype:?}"),
                    Base::Dense(None) => "not initialised".into(),
                },
                format!("{:?}", weight.way).to_lowercase(),
                adapters.collect::<Vec<_>>().join(", "),
            ]
        });
        let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: [usize; 5] = std::array::from_fn(width);
        let line = |row: &[String; 5]| {
            let cells = row.iter().zip(widths);
            let line: String = cells
                .map(|(cell, width)| format!("{cell:width$}  "))
                .collect();
            format!("{}\n", line.trim_end())
        };
        rows.iter().map(line).collect()
    }

    /// Share of the parameters that require a gradient, in percent.
    pub fn trainable_percent(&self) -> f64 {
        100.0 * self.trainable_params as f64 / self.total_params.max(1) as f64
    }

    /// Paths of the modules that a forward pass has composed densely: their call sites lack `forward_peft`.
    pub fn composed(&self) -> impl Iterator<Item = &str> {
        let composed = self
            .weights
            .iter()
            .filter(|weight| weight.way == Way::Composed);
        composed.map(|weight| weight.path.as_str())
    }
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        writeln!(
            f,
            "trainable parameters: {} of {} ({:.4} %)",
            self.trainable_params,
            self.total_params,
            self.trainable_percent()
        )?;
        write!(
            f,
            "memory: dense {:.2} MiB, NF4 {:.2} MiB, adapters {:.2} MiB",
            mib(self.dense_bytes),
            mib(self.nf4_bytes),
            mib(self.adapter_bytes)
        )?;
        let composed: Vec<&str> = self.composed().collect();
        if !composed.is_empty() {
            write!(
                f,
                "\n{} weights are composed densely (their layers do not call `forward_peft`): {}",
                composed.len(),
                composed.join(", ")
            )?;
        }
        Ok(())
    }
}
