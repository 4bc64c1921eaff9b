//! What is attached to a model, what of it trains, and what it weighs.

use std::fmt;

use burn::module::Module;
use burn::tensor::{DType, FloatDType};

use super::target::TargetReport;
use super::traverse::Site;
use super::weight::Way;

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

/// One weight that has something attached to it.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightReport {
    /// Path of its module.
    pub path: String,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// How the base is stored.
    pub base: Base,
    /// Names of its adapters.
    pub adapters: Vec<String>,
    /// How forward passes have read it so far.
    pub way: Way,
}

/// The state of a whole model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelReport {
    /// Name of the active adapter.
    pub active: Option<String>,
    /// Whether adapters are enabled.
    pub enabled: bool,
    /// Every weight with something attached, in the model's order.
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
    pub(super) fn new(sites: Vec<Site>, active: Option<String>, enabled: bool) -> Self {
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
            let stored: usize = site.shape.iter().product();
            report.total_params += stored + site.foreign_params;
            report.dense_bytes += stored * site.dtype.map_or(4, |dtype| dtype.size());
            if site.trainable {
                report.trainable_params += stored;
            }
            let (module, dims) = (
                site.module().to_owned(),
                site.state.is_some().then(|| site.dims()),
            );
            let (Some(state), Some(dims)) = (site.state, dims) else {
                continue;
            };
            if let Some(nf4) = &state.nf4 {
                report.total_params += nf4.num_weights();
                report.nf4_bytes += nf4.num_bytes();
            }
            for adapter in &state.adapters {
                let params = adapter.lora.num_params();
                let dtype = DType::from(FloatDType::from(adapter.lora.a.val().dtype()));
                report.total_params += params;
                report.adapter_bytes += params * dtype.size();
                if state.active.as_ref() == Some(&adapter.name) {
                    report.trainable_params += params;
                }
            }
            report.weights.push(WeightReport {
                path: module,
                dims,
                base: if state.nf4.is_some() {
                    Base::Nf4
                } else {
                    Base::Dense(site.dtype)
                },
                adapters: state
                    .adapters
                    .iter()
                    .map(|adapter| adapter.name.clone())
                    .collect(),
                way: state.way(),
            });
        }
        report
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
