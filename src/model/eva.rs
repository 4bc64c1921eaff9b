//! EVA on whole models: an adapter whose factors come from the inputs that its modules met on a calibration batch.

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::config::PeftConfig;
use super::fresh::{dense_weights, fresh};
use super::peft_model::{PeftModel, targets_by_module};
use super::target::TargetConfig;
use crate::adapter::{Directions, LoraConfig, LoraInit, cast, share_out};
use crate::{PeftError, Result};

/// What EVA made of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaModule {
    /// Its path.
    pub path: String,
    /// Its rank; one of 0 has no adapter.
    pub rank: usize,
    /// The share of the inputs' squared norm that lies in the directions of its `A`, in `[0, 1]`.
    pub explained: f64,
}

impl<M: Module> PeftModel<M> {
    /// Adds an adapter whose `A` are the main directions of the `inputs [rows, d_in]` of each module, by its path:
    /// [EVA](https://arxiv.org/abs/2410.07170). `B` is zero, so a fresh adapter changes nothing. It becomes the active one if the
    /// model had none.
    ///
    /// The inputs are what the modules are called with in your own forward pass over a batch or a few: keep the tensor
    /// that goes into each and flatten it to rows. Unlike PEFT, nothing is subtracted from them: what LoRA multiplies is the
    /// input itself, not its difference from a mean. All inputs are decomposed on the host, each a few times its size.
    ///
    /// `rho` is how many times `config.rank` a module may have: at 1 each has that rank; above, the ranks, in sum the same, go
    /// to the directions with the largest shares of their inputs, as PEFT does with `rho`, and a module that gets none is
    /// left out. The scale of every module is that of `config`: `α` goes with the rank. The initialisation of `config` does not
    /// matter.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a `rho` that is below 1 or not finite, and for inputs of fewer rows or features than the
    /// rank; [`PeftError::NoTargets`] without inputs; [`PeftError::UnknownModule`]; [`PeftError::Shape`] for inputs of
    /// another width than the module's; [`PeftError::NotFinite`], [`PeftError::Decomposition`]; and those of
    /// [`insert_adapter`](Self::insert_adapter). The model has not changed then.
    pub fn add_adapter_eva(
        &mut self,
        name: &str,
        config: &LoraConfig,
        inputs: &HashMap<String, Tensor<2>>,
        rho: f64,
    ) -> Result<Vec<EvaModule>> {
        let config = config.clone().with_init(LoraInit::Kaiming);
        config.validate()?;
        if !(rho.is_finite() && rho >= 1.0) {
            return Err(PeftError::config(
                "rho",
                rho,
                "a finite number of at least 1",
            ));
        }
        let sites = self.linear_sites();
        let known = targets_by_module(sites.iter());
        if let Some(path) = inputs
            .keys()
            .find(|path| !known.contains_key(path.as_str()))
        {
            return Err(PeftError::UnknownModule { path: path.clone() });
        }
        // In the model's order, so that equal shares are always shared out alike.
        let mut modules = Vec::with_capacity(inputs.len());
        for site in &sites {
            let path = site.module();
            if let Some(inputs) = inputs.get(path) {
                modules.push((site, directions(path, inputs, site.dims()[0], config.rank)?));
            }
        }
        if modules.is_empty() {
            return Err(PeftError::NoTargets {
                candidates: sites.len(),
                excluded: 0,
            });
        }
        let shares = modules.iter().map(|(_, found)| found.shares.as_slice());
        let shares: Vec<_> = shares.collect();
        let most = (config.rank as f64 * rho).round() as usize;
        let ranks = share_out(&shares, config.rank, most);

        let needing = modules
            .iter()
            .filter(|_| config.dora)
            .map(|(site, _)| *site);
        let dense = dense_weights(self.module(), needing);
        let mut adapter = PeftConfig::new(config.clone(), TargetConfig::list::<String>([]));
        let (mut report, mut factors, mut paths) = (Vec::new(), Vec::new(), Vec::new());
        for ((site, found), rank) in modules.iter().zip(ranks) {
            let path = site.module().to_owned();
            report.push(EvaModule {
                path: path.clone(),
                rank,
                explained: found.shares[..rank].iter().sum(),
            });
            if rank == 0 {
                continue;
            }
            let device = self.device_of(site);
            let mut own = config.clone();
            own.rank = rank;
            own.alpha *= config.scale() / own.scale();
            let mut lora = fresh(&own, site, &device, &dense)?;
            let a = cast(found.factor(rank, &device), config.dtype);
            // Every slice begins with the same directions: its inputs are the same.
            let a = a.repeat_dim(1, config.slices.chosen());
            lora.a = Param::from_tensor(a);
            if rank != config.rank {
                let key = regex::escape(&path);
                let targets = adapter.targets.with_rank_pattern(key.clone(), rank);
                adapter.targets = targets.with_alpha_pattern(key, own.alpha);
            }
            paths.push(path.clone());
            factors.push((path, lora));
        }
        adapter.targets.target_modules = TargetConfig::list(paths).target_modules;
        self.insert_adapter(name, &adapter, factors)?;
        Ok(report)
    }
}

/// The directions of inputs that fit the module and have at least `rank` of them.
fn directions(path: &str, inputs: &Tensor<2>, d_in: usize, rank: usize) -> Result<Directions> {
    let [rows, width] = inputs.dims();
    if width != d_in {
        return Err(PeftError::Shape {
            tensor: format!("inputs of `{path}`"),
            expected: [rows, d_in].into(),
            found: [rows, width].into(),
        });
    }
    if rank > rows.min(width) {
        return Err(PeftError::config(
            format!("rank of `{path}`"),
            rank,
            format!("at most that of the inputs [{rows}, {width}]"),
        ));
    }
    Directions::new(&format!("inputs of `{path}`"), inputs)
}
