//! What a checkpoint belongs to, in words, and how two such descriptions differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use burn::module::Module;

use crate::Result;
use crate::adapter::{Change, Lora, Slices};
use crate::model::{Base, PeftModel};

/// Properties of a model and their values: equal texts are equal properties.
pub(super) type Description = BTreeMap<String, String>;

/// One thing in which a checkpoint is not of the model or optimiser it was to be loaded into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub what: String,
    /// What it is in the checkpoint, if it is there.
    pub checkpoint: Option<String>,
    /// What it is here, if it is.
    pub here: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let text = |value: &Option<String>| match value {
            Some(value) => format!("`{value}`"),
            None => "nothing".into(),
        };
        let (checkpoint, here) = (text(&self.checkpoint), text(&self.here));
        write!(
            f,
            "{}: {checkpoint} in the checkpoint, {here} here",
            self.what
        )
    }
}

/// The adapters of `model`: all that the outputs depend on beside the values of factors and base.
pub(super) fn describe<M: Module>(model: &PeftModel<M>) -> Result<Description> {
    let weights = model.report().weights;
    let bases: BTreeMap<_, _> = weights
        .iter()
        .map(|weight| (weight.path.as_str(), weight.base))
        .collect();
    let mut description = Description::new();
    for name in model.adapters() {
        if model.active().uses(name) && !model.is_trainable(name)? {
            description.insert(format!("training of adapter `{name}`"), "frozen".into());
        }
        for (path, change) in model.changes(name)? {
            let module = path.strip_suffix(".weight").unwrap_or(&path);
            let (what, text) = match change {
                Change::Lora(lora) => {
                    let base = bases.get(module).copied();
                    let what = format!("adapter `{name}` of `{module}`");
                    (what, lora_text(&lora, base))
                }
                Change::Copy(copy) => {
                    let what = format!("adapter `{name}`, its copy of `{path}`");
                    (what, format!("{:?} {:?}", copy.dtype(), copy.shape()))
                }
                Change::Rows(rows) => {
                    let what = format!("adapter `{name}`, its rows of `{path}`");
                    (
                        what,
                        format!("{:?}, rows {:?}", rows.dtype(), rows.indices()),
                    )
                }
            };
            description.insert(what, text);
        }
    }
    description.insert("the active adapter".into(), model.active().to_string());
    Ok(description)
}

fn lora_text(lora: &Lora, base: Option<Base>) -> String {
    let config = lora.config();
    let [d_in, d_out] = lora.dims();
    // The dtype of a dense base is not known before its first use.
    let base = match base {
        Some(Base::Nf4) => "NF4",
        _ => "dense",
    };
    let slices = match &config.slices {
        Slices::Whole => String::new(),
        slices => format!(", slices {slices:?}"),
    };
    let frozen = if config.freeze_a { ", A frozen" } else { "" };
    format!(
        "rank {}, alpha {}, dropout {}, rslora {}, dora {}, {:?}{slices}{frozen} on a {base} [{d_in}, {d_out}]",
        config.rank, config.alpha, config.dropout, config.rslora, config.dora, config.dtype,
    )
}

/// All differences, in the order of their names.
pub(super) fn differences(checkpoint: &Description, here: &Description) -> Vec<Difference> {
    let names: BTreeSet<&String> = checkpoint.keys().chain(here.keys()).collect();
    let both = names.into_iter().map(|name| Difference {
        what: name.clone(),
        checkpoint: checkpoint.get(name).cloned(),
        here: here.get(name).cloned(),
    });
    both.filter(|difference| difference.checkpoint != difference.here)
        .collect()
}
