//! A digest of what a model computes with: to know the numbers of one model from those of another.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Int, Tensor, TensorData};
use sha2::{Digest as _, Sha256};

use super::peft_model::PeftModel;
use super::weight::PeftWeight;

impl<M: Module> PeftModel<M> {
    /// SHA-256 of every parameter's path, shape, dtype and values, packed ones as they are packed, of the adapters in use with their
    /// configurations, and of whether they are enabled: 64 lower-case hexadecimal digits.
    ///
    /// Models of equal digests give equal outputs for equal inputs. Reads every parameter from its device once, one after another.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"burn-peft model\0");
        let names: Vec<&str> = self.adapters().collect();
        for name in names {
            if let Ok(config) = self.config(name) {
                text(&mut hash, &format!("{name} {config:?}"));
            }
        }
        text(
            &mut hash,
            &format!("{:?} {}", self.active(), self.is_enabled()),
        );
        let mut values = Values {
            hash,
            path: Vec::new(),
        };
        self.module().visit(&mut values);
        let digest = values.hash.finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A text with its length, so that no two lists of texts look alike.
fn text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}

struct Values {
    hash: Sha256,
    path: Vec<String>,
}

impl Values {
    fn add(&mut self, data: TensorData) {
        let path = self.path.join(".");
        text(
            &mut self.hash,
            &format!("{path} {:?} {:?}", data.shape(), data.dtype()),
        );
        self.hash.update(&**data.bytes());
    }
}

impl ModuleVisitor for Values {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let state = param.reparameterization::<PeftWeight>();
        // The dense look of a packed weight holds nothing; what is packed comes as integers.
        match state.is_some_and(|state| state.nf4.is_some()) {
            true => text(&mut self.hash, &format!("packed {:?}", param.lazy_shape())),
            false => self.add(param.base().into_data()),
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(param.val().into_data());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(param.val().into_data());
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::{PeftConfig, TargetConfig};
    use crate::nf4::Nf4Config;

    #[derive(Module, Debug)]
    struct Model {
        q_proj: Linear,
    }

    #[test]
    fn digests_are_equal_for_equal_models_alone() {
        let q_proj = LinearConfig::new(64, 64).init(&Device::default());
        let mut model = PeftModel::new(Model { q_proj });
        let mut seen = vec![model.fingerprint()];
        let mut changed = |model: &PeftModel<Model>| {
            let digest = model.fingerprint();
            assert_eq!(digest, model.clone().fingerprint());
            assert_eq!(digest.len(), 64);
            assert!(!seen.contains(&digest));
            seen.push(digest);
        };
        let targets = TargetConfig::list(["q_proj"]);
        model.quantize_nf4(&targets, &Nf4Config::new()).unwrap();
        changed(&model);
        let config = PeftConfig::new(LoraConfig::new(2), targets.clone());
        model.add_adapter("default", &config).unwrap();
        changed(&model);
        let config = PeftConfig::new(LoraConfig::new(2).with_alpha(3.0), targets);
        model.add_adapter("other", &config).unwrap();
        changed(&model);
        model.set_adapter("other").unwrap();
        changed(&model);
        model.disable_adapters();
        changed(&model);
    }
}
