//! Which factors of the first and of the last block moved in training.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};

/// The factors of the first and of the last block, by path.
pub fn of<M: Module>(model: &M) -> BTreeMap<String, TensorData> {
    let mut factors = Factors::default();
    model.visit(&mut factors);
    let Factors { found, last, .. } = factors;
    let kept = |block: usize| block == 0 || block == last;
    let found = found.into_iter().filter(|(block, ..)| kept(*block));
    found.map(|(_, path, data)| (path, data)).collect()
}

/// How many there are, and those whose values are the same as before.
pub struct Moved {
    /// All that were looked at.
    pub all: usize,
    /// Paths of those that did not move, or are not finite.
    pub stuck: Vec<String>,
}

/// Compares the factors before and after training.
pub fn moved(before: &BTreeMap<String, TensorData>, after: &BTreeMap<String, TensorData>) -> Moved {
    let is_stuck = |(path, data): &(&String, &TensorData)| {
        before.get(*path) == Some(*data) || data.iter::<f32>().any(|value| !value.is_finite())
    };
    let stuck = after.iter().filter(is_stuck);
    Moved {
        all: after.len(),
        stuck: stuck.map(|(path, _)| path.clone()).collect(),
    }
}

#[derive(Default)]
struct Factors {
    path: Vec<String>,
    /// The last block that was met.
    last: usize,
    found: Vec<(usize, String, TensorData)>,
}

impl ModuleVisitor for Factors {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(block) = self.path.iter().find_map(|name| name.parse().ok()) else {
            return;
        };
        if !self.path.iter().any(|name| name == "peft") {
            return;
        }
        if block > 0 && block > self.last {
            // The block before was not the last one.
            let first_or_this = |(found, ..): &(usize, String, TensorData)| *found == 0;
            self.found.retain(first_or_this);
            self.last = block;
        }
        let data = param.val().into_data();
        self.found.push((block, self.path.join("."), data));
    }
}
