"""Makes the fixtures of PEFT's other kinds of layers and parameters. Run: python tests/golden/kinds/generate.py
(after tests/golden/llama/generate.py)

    base.safetensors           the weights of `Kinds` (model.py) in torch's layout, F32
    kinds.json                 [{name, what, adapter, base}]: the cases; `base` is `kinds`, `kinds-transposed` (the same
                               weights, the experts as [E, in, out]), or `tied` or `untied` of ../llama
    <case>/                    adapter of PEFT, as `save_pretrained` wrote it, less its README.md; every value as if trained
    <case>/outputs.safetensors tokens I64 ([3, 7], of a Llama [1, 8]), base and adapted F32, and where PEFT can merge the
                               adapter the output afterwards, `merged`. For a Llama they are logits
    <case>/gradients.safetensors
                               of the cases of `Kinds`: `weights` [3, 5], and of sum(weights · output) the gradient by each tensor
                               of the adapter, under the adapter file's key

All arithmetic is f32. Cases that PEFT does not have: LoRA and trainable tokens on one embedding, `lora_bias` on an embedding, DoRA
or dropout on `target_parameters` (all are errors), and a dilated convolution (its forward fails).
"""

import json
import os
import pathlib
import sys
import warnings

import peft
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import model as kinds

HERE = pathlib.Path(__file__).parent
# Every layer of `Kinds` that LoRA can adapt by its module. Ranks must be multiples of the 3 groups of `grouped`.
LAYERS = ["embed", "conv1", "grouped", "up", "conv2", "head"]
# Those with a bias that PEFT can merge: it refuses groups.
MERGEABLE = ["conv1", "up", "conv2", "head"]
LORA = dict(r=3, lora_alpha=5)

# name -> what it has, and the configuration
CASES = {
    # Dropout, because PEFT never applies it to an embedding.
    "embedding": ("LoRA on an embedding", dict(target_modules=["embed"], lora_dropout=0.1)),
    "embedding-rslora": ("rsLoRA on an embedding", dict(target_modules=["embed"], use_rslora=True)),
    "embedding-dora": ("DoRA on an embedding", dict(target_modules=["embed"], use_dora=True)),
    "conv1d": ("LoRA on a one-dimensional convolution", dict(target_modules=["conv1"])),
    "conv2d": ("LoRA on a two-dimensional convolution with stride and padding", dict(target_modules=["conv2"])),
    "conv-dora": ("DoRA on both convolutions", dict(target_modules=["conv1", "conv2"], use_dora=True)),
    "grouped": ("LoRA on a convolution of 3 groups", dict(target_modules=["grouped"], r=6)),
    "lora-bias": ("`lora_bias` on linear layers and convolutions", dict(target_modules=MERGEABLE, lora_bias=True)),
    "bias-lora-only": ("`bias=\"lora_only\"`", dict(target_modules=["up", "conv2"], bias="lora_only")),
    "bias-all": ("`bias=\"all\"`", dict(target_modules=["up", "conv2"], bias="all")),
    "modules-to-save": (
        "`modules_to_save`: a linear layer, a norm and an embedding",
        dict(target_modules=["up"], modules_to_save=["head", "norm", "embed"]),
    ),
    "saved-bias": (
        "`modules_to_save` beside `bias=\"all\"`, for which PEFT writes keys that it does not read",
        dict(target_modules=["up"], modules_to_save=["norm"], bias="all"),
    ),
    # Not sorted: the rows are in the order of the list.
    "tokens-list": ("trained tokens, as a list", dict(target_modules=["up"], trainable_token_indices=[7, 2, 9])),
    "tokens-dict": (
        "trained tokens, by the module's name", dict(target_modules=["up"], trainable_token_indices={"embed": [4, 0]})
    ),
    "tokens-with-lora": (
        "trained tokens beside LoRA on other layers",
        dict(target_modules=MERGEABLE, trainable_token_indices={"embed": [10, 3, 1]}),
    ),
    "experts-one": ("`target_parameters`: one tensor of experts", dict(target_parameters=["experts.weight"])),
    "experts-two": (
        "`target_parameters`: two tensors of one module",
        dict(target_modules=["up"], target_parameters=["experts.gate", "experts.weight"], use_rslora=True),
    ),
    "experts-transposed": (
        "`target_parameters` of experts stored as [E, in, out]",
        dict(target_parameters=["experts.weight", "experts.gate"]),
    ),
    # A bare name that a rank of another module stands beside.
    "experts-bare": (
        "`target_parameters` by a bare name, beside a module with a rank of its own",
        dict(target_modules=["up"], target_parameters=["gate"], rank_pattern={"up": 2}),
    ),
    "experts-patterns": (
        "`target_parameters`: two tensors of one module, each with a rank and an alpha of its own",
        dict(
            target_parameters=["gate", "experts.weight"], rank_pattern={"experts.gate": 2, "experts.weight": 4},
            alpha_pattern={"weight": 7},
        ),
    ),
    "everything": (
        "LoRA on every layer and on experts, trained biases, a saved norm, ranks by pattern",
        dict(
            target_modules=LAYERS, target_parameters=["experts.gate"], modules_to_save=["norm"], bias="lora_only",
            rank_pattern={"conv2": 2, "up": 5}, alpha_pattern={"embed": 7},
        ),
    ),
    "everything-bias": (
        "`lora_bias`, all biases, and trained tokens",
        dict(target_modules=LAYERS[1:], lora_bias=True, bias="all", trainable_token_indices={"embed": [6]}, use_rslora=True),
    ),
}
# name -> base, what it has, the configuration, and what `save_embedding_layers` is
LLAMAS = {
    # "norm" is a suffix of every norm's name.
    "llama-modules-to-save": (
        "untied", "the head and all norms saved whole", dict(modules_to_save=["lm_head", "norm"]), "auto"
    ),
    "llama-bias": ("untied", "`bias=\"all\"`", dict(bias="all"), "auto"),
    "llama-tokens-tied": ("tied", "trained tokens, which the tied head shares", dict(trainable_token_indices=[50, 3]), "auto"),
    "llama-tokens-untied": (
        "untied", "trained tokens of the embedding and of the head",
        dict(trainable_token_indices={"embed_tokens": [50, 3], "lm_head": [3, 80, 12]}), "auto",
    ),
    "llama-tied-weights": (
        "tied", "`ensure_weight_tying` of a saved head", dict(modules_to_save=["lm_head"], ensure_weight_tying=True), "auto"
    ),
    "llama-tied-lora": (
        "tied", "`ensure_weight_tying` of LoRA on the embedding",
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), False,
    ),
    "llama-embedding-lora": (
        "untied", "LoRA on the embedding and the head", dict(target_modules=["embed_tokens", "lm_head"]), False
    ),
    "llama-embedding-lora-base": (
        "untied", "LoRA on the embedding and the head, with the base's own weights in the file",
        dict(target_modules=["embed_tokens", "lm_head"]), True,
    ),
}


def base() -> None:
    torch.manual_seed(0)
    model = kinds.Kinds()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "norm.weight":
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif name == "embed.weight":
                parameter.normal_(0.0, 1.0)
            else:
                # So that no tanh saturates and every layer's output is of the size of 1.
                inputs = parameter.shape[2] if parameter.dim() == 3 and "experts" in name else parameter[0].numel()
                parameter.normal_(0.0, inputs**-0.5)
    save_file(model.state_dict(), "base.safetensors")


def as_if_trained(model: torch.nn.Module) -> None:
    """Moves every trained value, because a fresh one would hide mistakes."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        elif "lora_" in name:
            parameter.data.normal_(0.0, 0.3)
        else:
            parameter.data += torch.empty_like(parameter).normal_(0.0, 0.5)


def gradients(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(3, 5)
    trained = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    (model(tokens) * weights).sum().backward()
    stored = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT's file may have the same tensor under a second key, see `saved-bias`, and the untrained original.
    found = {
        key: trained[tensor.data_ptr()].grad
        for key, tensor in stored.items()
        if tensor.data_ptr() in trained and ".modules_to_save." not in key
    }
    assert len(found) == len(trained), sorted(stored)
    for key, gradient in found.items():
        # Else the outputs would say nothing of this tensor.
        assert gradient.abs().max() > 1e-3, key
    return {"weights": weights} | {key: gradient.clone().contiguous() for key, gradient in found.items()}


def adapter(name: str, model: torch.nn.Module, tokens: torch.Tensor, config: dict, save_embedding_layers="auto") -> None:
    def output(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found = model(tokens)
        return getattr(found, "logits", found).clone().contiguous()

    torch.manual_seed(1)
    outputs = {"tokens": tokens, "base": output(model)}
    is_llama = isinstance(model, LlamaForCausalLM)
    model = get_peft_model(model, LoraConfig(**(LORA | config))).eval()
    as_if_trained(model)
    outputs["adapted"] = output(model)
    model.save_pretrained(name, save_embedding_layers=save_embedding_layers)
    (pathlib.Path(name) / "README.md").unlink()
    if not is_llama:
        save_file(gradients(model, tokens), f"{name}/gradients.safetensors")
    # Into a tied weight PEFT merges both the embedding's change and the head's, which is twice the change.
    groups = "grouped" in config.get("target_modules", [])
    if not groups and name != "llama-tied-lora":
        outputs["merged"] = output(model.merge_and_unload())
        torch.testing.assert_close(outputs["merged"], outputs["adapted"], rtol=1e-4, atol=1e-4)
    save_file(outputs, f"{name}/outputs.safetensors")
    difference = (outputs["adapted"] - outputs["base"]).abs().max().item()
    assert difference > 1e-2, (name, difference)
    print(name, "largest difference from the base", difference)


if __name__ == "__main__":
    # PEFT writes sets as lists, in the order of their hashes.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    os.chdir(HERE)
    kinds.HERE = pathlib.Path(".")
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    base()
    listed = []
    for name, (what, config) in CASES.items():
        kind = "kinds-transposed" if name == "experts-transposed" else "kinds"
        torch.manual_seed(2)
        adapter(name, kinds.load(kind == "kinds-transposed"), torch.randint(0, 11, (3, 7)), config)
        listed.append({"name": name, "what": what, "adapter": name, "base": kind})
    for name, (kind, what, config, save_embedding_layers) in LLAMAS.items():
        # A relative path, because PEFT writes it into the configuration.
        llama = LlamaForCausalLM.from_pretrained(f"../llama/{kind}", dtype=torch.float32).eval()
        # With the trained tokens 3 and 50 among them.
        tokens = torch.tensor([[17, 3, 88, 50, 4, 3, 61, 29]])
        config = dict(target_modules=["q_proj"]) | config | dict(r=2, task_type="CAUSAL_LM")
        adapter(name, llama, tokens, config, save_embedding_layers)
        listed.append({"name": name, "what": what, "adapter": name, "base": kind})
    pathlib.Path("kinds.json").write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n")
    print("peft", peft.__version__, "torch", torch.__version__)
