//! What the tests ask of a model.

use std::fmt::Debug;

use bunsen::kits::gpts::qwen3::Qwen3Model;
use bunsen::kits::images::resnet::ResNet;
use bunsen::kits::images::swin::v2::SwinTransformerV2;
use bunsen::kits::speech::whisper::Whisper;
use burn::module::{Module, ModuleDisplay};
use burn::tensor::{Device, Int, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{BaseOptions, NameMap};
use burn_peft::model::{PeftConfig, TargetConfig};
use burn_peft_interop_bunsen as models;

use crate::golden::Golden;

/// A model of bunsen's with a checkpoint and golden outputs in `data/<NAME>`.
pub trait Network: Module + ModuleDisplay + 'static {
    const NAME: &'static str;
    /// The output head, which stays dense and gets no factors.
    const HEAD: &'static str = "lm_head";
    type Input: Clone + Debug + Send + 'static;

    fn fresh(device: &Device) -> Self;
    fn names() -> NameMap;
    fn options() -> BaseOptions;
    /// The linear weights that are packed.
    fn packed() -> TargetConfig {
        TargetConfig::all_linear()
    }
    /// A fresh adapter to train.
    fn adapter() -> PeftConfig {
        let lora = LoraConfig::new(4).with_alpha(8.0);
        PeftConfig::new(lora, TargetConfig::all_linear())
    }

    fn input(golden: &Golden, device: &Device) -> Self::Input;
    /// `[rows, classes]`: a row for each token or image.
    fn logits(&self, input: Self::Input) -> Tensor<2>;
}

impl Network for Qwen3Model {
    const NAME: &'static str = "qwen3";
    type Input = Tensor<2, Int>;

    fn fresh(device: &Device) -> Self {
        models::qwen3::model(device)
    }

    fn names() -> NameMap {
        models::qwen3::names()
    }

    fn options() -> BaseOptions {
        models::qwen3::options()
    }

    fn input(golden: &Golden, device: &Device) -> Self::Input {
        golden.integers("tokens", device)
    }

    fn logits(&self, tokens: Self::Input) -> Tensor<2> {
        let positions = self.rotary(tokens.dims()[1], &tokens.device());
        let hidden = self.forward_hidden(self.embed(tokens), &positions, None);
        self.logits(hidden).flatten(0, 1)
    }
}

impl Network for Whisper {
    const NAME: &'static str = "whisper";
    type Input = (Tensor<3>, Tensor<2, Int>);

    fn fresh(device: &Device) -> Self {
        models::whisper::model(device)
    }

    fn names() -> NameMap {
        models::whisper::names()
    }

    fn options() -> BaseOptions {
        models::whisper::options()
    }

    fn adapter() -> PeftConfig {
        let lora = LoraConfig::new(4).with_alpha(8.0).with_dora(true);
        PeftConfig::new(lora, TargetConfig::all_linear())
    }

    fn input(golden: &Golden, device: &Device) -> Self::Input {
        (
            golden.floats("mel", device),
            golden.integers("tokens", device),
        )
    }

    fn logits(&self, (mel, tokens): Self::Input) -> Tensor<2> {
        self.forward(mel, tokens).flatten(0, 1)
    }
}

impl Network for ResNet {
    const NAME: &'static str = "resnet";
    type Input = Tensor<4>;

    fn fresh(device: &Device) -> Self {
        models::resnet::model(device)
    }

    fn names() -> NameMap {
        models::resnet::names()
    }

    fn options() -> BaseOptions {
        models::resnet::options()
    }

    fn packed() -> TargetConfig {
        TargetConfig::list(["output_fc"])
    }

    fn adapter() -> PeftConfig {
        let lora = LoraConfig::new(2).with_alpha(4.0);
        PeftConfig::new(lora, TargetConfig::list(["conv"])).with_modules_to_save(["output_fc"])
    }

    fn input(golden: &Golden, device: &Device) -> Self::Input {
        golden.floats("images", device)
    }

    fn logits(&self, images: Self::Input) -> Tensor<2> {
        self.forward(images)
    }
}

impl Network for SwinTransformerV2 {
    const NAME: &'static str = "swin";
    const HEAD: &'static str = "head";
    type Input = Tensor<4>;

    fn fresh(device: &Device) -> Self {
        models::swin::model(device)
    }

    fn names() -> NameMap {
        models::swin::names()
    }

    fn options() -> BaseOptions {
        models::swin::options()
    }

    fn adapter() -> PeftConfig {
        let lora = LoraConfig::new(4).with_alpha(8.0);
        PeftConfig::new(lora, TargetConfig::all_linear()).with_modules_to_save(["head"])
    }

    fn input(golden: &Golden, device: &Device) -> Self::Input {
        golden.floats("images", device)
    }

    fn logits(&self, images: Self::Input) -> Tensor<2> {
        self.forward(images)
    }
}
