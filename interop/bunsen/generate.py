"""Makes the checkpoints, the adapters and the outputs in `data/`, with torch, transformers, torchvision, PEFT and bitsandbytes.

    PYTHONHASHSEED=0 python interop/bunsen/generate.py

`data/<model>/` has

* `model.safetensors`, and `config.json` for transformers' models: random weights, saved by the library that the model is of;
* `adapter/`: a PEFT adapter of random factors, saved by PEFT;
* `golden.safetensors`: inputs, labels to train on, and Python's outputs in f32: of the base (`logits`), with the adapter
  (`logits_adapter`), and both over linear weights that bitsandbytes has packed in NF4 (`logits_nf4`, `logits_nf4_adapter`).

The same versions give the same bytes (PEFT writes a set of names in the order of their hashes). The files that are committed were made by torch 2.13.0, transformers 5.24.0, torchvision 0.28.0,
PEFT 0.21.2 and bitsandbytes 0.50.2.
"""

import copy
import math
import pathlib
import shutil

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from models import MODELS, logits

DATA = pathlib.Path(__file__).parent / "data"

# The element types that the models are published in.
DTYPES = {"qwen3": torch.bfloat16, "whisper": torch.float16, "resnet": torch.float32, "swin": torch.float32}

ADAPTERS = {
    "qwen3": LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        rank_pattern={"o_proj": 2},
        task_type="CAUSAL_LM",
    ),
    "whisper": LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["q_proj", "v_proj", "fc1"]),
    "resnet": LoraConfig(r=2, lora_alpha=2, target_modules=["conv1", "conv2", "downsample.0"], modules_to_save=["fc"]),
    "swin": LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["query", "value", "dense", "reduction"],
        alpha_pattern={"reduction": 8},
        modules_to_save=["classifier"],
    ),
}

# What stays dense beside NF4: outputs that are not tied to an embedding, as transformers has it. Of a ResNet nothing else is linear.
HEADS = {"qwen3": "lm_head", "whisper": "proj_out", "resnet": None, "swin": "classifier"}


def fill(name: str, model: nn.Module, generator: torch.Generator) -> None:
    """Weights at which outputs are of the order of 1, and to which every parameter matters."""
    normal = lambda tensor, std: tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    # Nothing bounds what adds up along a ResNet.
    gain = 1.1 if name == "resnet" else 1.5
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            owner = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith("logit_scale"):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif not tensor.is_floating_point():
                tensor.fill_(100)
            elif isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d)) and tensor.dim() > 1:
                normal(tensor, gain / math.sqrt(tensor[0].numel()))
            elif isinstance(owner, nn.Embedding):
                normal(tensor, 0.7)
            elif name.endswith("weight"):
                normal(tensor, 0.2).add_(1.0)
            else:
                normal(tensor, 0.2)


def inputs(name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 48, (2, 9), generator=generator)
    if name == "qwen3":
        return {"tokens": tokens}
    if name == "whisper":
        return {"mel": torch.randn((2, 8, 24), generator=generator), "tokens": tokens}
    return {"images": torch.randn((2, 3, 32, 32), generator=generator)}


def in_nf4(model: nn.Module, head: str | None) -> nn.Module:
    """A copy whose linear weights are what bitsandbytes' NF4 restores, in blocks of 64."""
    model = copy.deepcopy(model)
    code = get_4bit_type("nf4", device="cpu")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != head:
            weight = module.weight.data
            packed, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
            packed = packed.view(-1)
            codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: weight.numel()].long()
            scales = state.absmax.repeat_interleave(64)[: weight.numel()]
            module.weight.data = (code[codes] * scales).view_as(weight)
    return model


def make(name: str) -> None:
    directory = DATA / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    model = MODELS[name]()
    fill(name, model, generator)
    if name == "resnet":
        save_file(model.state_dict(), directory / "model.safetensors")
    else:
        model.to(DTYPES[name]).save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
    # As everybody else will see it.
    model = MODELS[name](directory)
    if name != "resnet":
        # PEFT writes down where the base was.
        model.name_or_path = name
    golden = inputs(name, generator)
    golden["logits"] = logits(name, model, golden)
    rows, classes = golden["logits"].shape
    golden["labels"] = torch.randint(classes, (rows,), generator=generator)
    packed = in_nf4(model, HEADS[name])
    golden["logits_nf4"] = logits(name, packed, golden)

    adapted = get_peft_model(model, copy.deepcopy(ADAPTERS[name])).eval()
    with torch.no_grad():
        for key, tensor in adapted.named_parameters():
            if ".lora_A." in key:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor[0].numel()))
            elif ".lora_B." in key:
                tensor.copy_((0.2 if name == "resnet" else 0.4) * torch.randn(tensor.shape, generator=generator))
            elif ".lora_magnitude_vector." in key:
                tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
            elif ".modules_to_save." in key:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    golden["logits_adapter"] = logits(name, adapted, golden)
    adapted.save_pretrained(directory / "adapter")
    (directory / "adapter" / "README.md").unlink(missing_ok=True)
    # The same factors over the packed base.
    over_nf4 = get_peft_model(packed, copy.deepcopy(ADAPTERS[name])).eval()
    over_nf4.load_state_dict({k: v for k, v in adapted.state_dict().items() if "lora_" in k or "modules_to_save" in k}, strict=False)
    golden["logits_nf4_adapter"] = logits(name, over_nf4, golden)
    save_file(golden, directory / "golden.safetensors")

    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    effect = lambda key: (golden[key] - golden["logits"]).abs().max().item()
    print(
        f"{name}: {size / 1000:.0f} KB, logits of {golden['logits'].std():.2f}; the adapter changes them by up to "
        f"{effect('logits_adapter'):.2f}, NF4 by {effect('logits_nf4'):.2f}"
    )


if __name__ == "__main__":
    for name in MODELS:
        make(name)
