//! A ResNet, from torchvision's `ResNet`.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::images::resnet::{ResNet, ResNetContractConfig};
use burn::module::Module;
use burn::tensor::Device;
use burn_peft::format::{BaseOptions, NameMap};

/// The model that `models.py` makes. Frozen, so that batch norms keep the statistics of the checkpoint.
pub fn model(device: &Device) -> ResNet {
    let model: ResNet = ResNetContractConfig::new(vec![1, 2, 1, 1], 10)
        .with_stem_width(4)
        .init(device);
    model.freeze()
}

// What a user writes.
pub fn names() -> NameMap {
    NameMap::new()
        .with_prefix("conv1", "input_cb.conv")
        .with_prefix("bn1", "input_cb.norm")
        .with_prefix("layer1", "layers.0.blocks")
        .with_prefix("layer2", "layers.1.blocks")
        .with_prefix("layer3", "layers.2.blocks")
        .with_prefix("layer4", "layers.3.blocks")
        .with_prefix("fc", "output_fc")
        .with_segments("conv1", "cb1.conv")
        .with_segments("bn1", "cb1.norm")
        .with_segments("conv2", "cb2.conv")
        .with_segments("bn2", "cb2.norm")
        .with_segments("downsample.0", "downsample.conv")
        .with_segments("downsample.1", "downsample.norm")
}

pub fn options() -> BaseOptions {
    BaseOptions::new()
        .with_names(names())
        .with_ignored(["num_batches_tracked"])
}
// Until here.
