//! A [`PeftModel`] as the Burn module that it holds: whatever walks, moves or shows one sees the other.

use std::ops::Deref;

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::Device;

use super::active::Active;
use super::dense_look::{map_packed, without_bases};
use super::merge::materialize;
use super::peft_model::PeftModel;

impl<M: Module> Deref for PeftModel<M> {
    type Target = M;

    fn deref(&self) -> &M {
        self.module()
    }
}

impl<M: Module> Module for PeftModel<M> {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.module().visit(visitor);
    }

    fn map<F: ModuleMapper>(mut self, mapper: &mut F) -> Self {
        self.module = self.module.map(|module| map_packed(module, mapper));
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.module().collect_devices(devices)
    }

    fn to_device(mut self, device: &Device) -> Self {
        let moved = |module: M| without_bases(module, |module| module.to_device(device));
        self.module = self.module.map(moved);
        self
    }

    fn fork(mut self, device: &Device) -> Self {
        let forked = |module: M| without_bases(module, |module| module.fork(device));
        self.module = self.module.map(forked);
        self
    }

    fn valid(&self) -> Self {
        Self {
            module: Some(without_bases(self.module().clone(), |module| {
                module.valid()
            })),
            adapters: self.adapters.clone(),
            active: self.active.clone(),
            enabled: self.enabled,
            compose: self.compose,
            head: self.head.clone(),
            experts: self.experts,
            groups: self.groups.clone(),
        }
    }

    fn train(mut self) -> Self {
        let trained = |module: M| without_bases(module, Module::train);
        self.module = self.module.map(trained);
        self
    }

    fn materialize(mut self) -> Self {
        // Burn folds what is attached into the weights, so that no adapter is left to name.
        self.module = self.module.map(materialize);
        self.adapters.clear();
        self.active = Active::none();
        self
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplayDefault for PeftModel<M> {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .add("adapters", &self.adapters().collect::<Vec<_>>().join(", "))
            .add("active", &self.active.to_string())
            .add("module", self.module())
            .optional()
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplay for PeftModel<M> {}
