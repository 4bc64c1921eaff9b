"""The four models in Python, as small as they can be, for `generate.py` and `check.py`.

Three are transformers' own classes. The ResNet is torchvision's own with fewer channels: its blocks, names and forward pass.

bunsen's Swin Transformer V2 is not quite transformers': its feed-forward has ReLU for GELU, its keys have a bias, its output projection
has none, and its patch merging takes the four neighbours row by row, where Microsoft's code takes them column by column. `Swinv2ForBunsen`
is transformers' class with these four differences, so that its checkpoint and its adapters are what transformers and PEFT write.
"""

import pathlib

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Swinv2Config,
    Swinv2ForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.swinv2 import modeling_swinv2


class SmallResNet(ResNet):
    """torchvision's ResNet, of 4, 8, 16 and 32 channels in place of 64 to 512."""

    def __init__(self):
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = 4, 1, 1, 64
        self.conv1 = nn.Conv2d(3, 4, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(BasicBlock, 4, 1)
        self.layer2 = self._make_layer(BasicBlock, 8, 2, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 16, 1, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 32, 1, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 10)


class PatchMergingByRows(modeling_swinv2.Swinv2PatchMerging):
    """The four neighbours row by row."""

    def forward(self, input_feature, input_dimensions):
        (height, width), (batch, _, channels) = input_dimensions, input_feature.shape
        x = input_feature.view(batch, height, width, channels)
        x = torch.cat([x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)], -1)
        return self.norm(self.reduction(x.view(batch, -1, 4 * channels)))


class Swinv2ForBunsen(Swinv2ForImageClassification):
    """transformers' class with bunsen's differences (`hidden_act` is in the configuration)."""

    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, modeling_swinv2.Swinv2SelfAttention):
                module.key = nn.Linear(module.all_head_size, module.all_head_size, bias=True)
            if isinstance(module, modeling_swinv2.Swinv2SelfOutput):
                module.dense = nn.Linear(module.dense.in_features, module.dense.out_features, bias=False)
            if isinstance(module, modeling_swinv2.Swinv2PatchMerging):
                module.__class__ = PatchMergingByRows


# No token of these has a meaning, but generation's configuration names some.
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def qwen3(directory: pathlib.Path | None = None) -> nn.Module:
    config = Qwen3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        **TOKENS,
    )
    return of_transformers(Qwen3ForCausalLM, config, directory)


def whisper(directory: pathlib.Path | None = None) -> nn.Module:
    config = WhisperConfig(
        vocab_size=48,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=128,
        max_source_positions=12,
        max_target_positions=16,
        decoder_start_token_id=1,
        **TOKENS,
    )
    return of_transformers(WhisperForConditionalGeneration, config, directory)


def resnet(directory: pathlib.Path | None = None) -> nn.Module:
    model = SmallResNet()
    if directory is not None:
        model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval()


def swin(directory: pathlib.Path | None = None) -> nn.Module:
    config = Swinv2Config(
        image_size=32,
        patch_size=4,
        num_channels=3,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        hidden_act="relu",
        num_labels=10,
    )
    return of_transformers(Swinv2ForBunsen, config, directory)


def of_transformers(kind, config, directory: pathlib.Path | None) -> nn.Module:
    """A fresh model, or the one in `directory`, of which nothing may be missing or too many."""
    if directory is None:
        return kind(config).eval()
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    left = {key: names for key, names in info.items() if names}
    assert not left, f"{directory}: {left}"
    return model.eval()


MODELS = {"qwen3": qwen3, "whisper": whisper, "resnet": resnet, "swin": swin}


def logits(name: str, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The outputs as a matrix: a row for each token or image, a column for each class."""
    with torch.no_grad():
        if name == "qwen3":
            out = model(input_ids=inputs["tokens"]).logits
        elif name == "whisper":
            out = model(input_features=inputs["mel"], decoder_input_ids=inputs["tokens"]).logits
        elif name == "swin":
            out = model(pixel_values=inputs["images"]).logits
        else:
            out = model(inputs["images"])
    return out.flatten(0, -2).contiguous()
