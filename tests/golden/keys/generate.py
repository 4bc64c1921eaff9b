"""What each key of `adapter_config.json` does in PEFT. Run: python tests/golden/keys/generate.py

    base.safetensors      the weights of `Net` in torch's layout, F32
    <set>/                adapters of PEFT, as `save_pretrained` wrote them, less their README.md; every value as if trained
    outputs.safetensors   `input`, tokens I64 [2, 3]; `base`, and for each set its outputs F32 [2, 3, 5]; `variant.N`, those of variant N
    keys.json             {"keys": [..], "variants": [{key, set, value, error}]}: all keys of PEFT's `LoraConfig`, and what PEFT does when
                          it loads the tensors of a set with another value of a key: an error, or outputs

Each variant has the tensors of its set and its configuration, with one key changed. All arithmetic is f32.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
import warnings

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
TOKENS = torch.tensor([[1, 5, 2], [9, 0, 5]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.v = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.q(x)) * self.v(x)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 5, 6))

    def forward(self, x):
        return torch.einsum("bti,eoi->bto", x, self.weight) / 3


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Net(nn.Module):
    """Tokens [batch, n] of a vocabulary of 11 to [batch, n, 5]."""

    def __init__(self):
        super().__init__()
        # PEFT finds an index of a layer only behind two names.
        self.body = Body()
        self.experts = Experts()
        self.head = nn.Linear(6, 5)

    def get_input_embeddings(self):
        return self.body.embed

    def forward(self, tokens):
        x = self.body(tokens)
        return self.head(x) + self.experts(x)


SETS = {
    "plain": dict(target_modules=["q", "v"], lora_dropout=0.1),
    "ranks": dict(target_modules=["q", "v"], rank_pattern={"layers.0.q": 3, "v": 1}, alpha_pattern={"layers.1.v": 3}),
    "dora": dict(target_modules=["q"], use_dora=True),
    "lora-bias": dict(target_modules=["q"], lora_bias=True),
    "bias": dict(target_modules=["q"], bias="all"),
    "saved": dict(target_modules=["q"], modules_to_save=["head"]),
    "tokens": dict(target_modules=["q"], trainable_token_indices=[5, 2]),
    "experts": dict(target_modules=["q"], target_parameters=["experts.weight"]),
    "embedding": dict(target_modules=["q", "embed"]),
}

# (key, set, value)
VARIANTS = [
    ("alora_invocation_tokens", "plain", [5]),
    ("alpha_pattern", "plain", {"q": 2.5}),
    ("alpha_pattern", "plain", {"layers.0.q": 3, "q": 7, "v": 0.5}),
    ("alpha_pattern", "ranks", {}),
    ("arrow_config", "plain", {"top_k": 1}),
    ("auto_mapping", "plain", {"base_model_class": "Other", "parent_library": "somewhere"}),
    ("base_model_name_or_path", "plain", "some/where"),
    ("bias", "plain", "lora_only"),
    ("bias", "bias", "none"),
    ("corda_config", "plain", {"corda_method": "kpm"}),
    ("ensure_weight_tying", "embedding", True),
    ("eva_config", "plain", {"rho": 3.0, "tau": 0.5}),
    ("exclude_modules", "plain", ["layers.0.q"]),
    ("exclude_modules", "plain", r".*\.1\.v"),
    ("fan_in_fan_out", "plain", True),
    ("inference_mode", "plain", False),
    ("init_lora_weights", "plain", False),
    ("init_lora_weights", "plain", "gaussian"),
    ("init_lora_weights", "plain", "pissa"),
    ("init_lora_weights", "plain", "olora"),
    ("init_lora_weights", "plain", "pissa_niter_2"),
    ("init_lora_weights", "plain", "orthogonal"),
    ("init_lora_weights", "plain", "mica"),
    ("init_lora_weights", "plain", "eva"),
    ("kasa_config", "plain", {"beta": 1e-4}),
    ("layer_replication", "plain", [[0, 1], [0, 2]]),
    ("layers_pattern", "plain", ["layers"]),
    ("layers_to_transform", "plain", [1]),
    ("layers_to_transform", "plain", 0),
    ("loftq_config", "plain", {"loftq_bits": 4}),
    ("lora_alpha", "plain", 7.25),
    ("lora_alpha", "plain", -3),
    ("lora_bias", "plain", True),
    ("lora_bias", "lora-bias", False),
    ("lora_dropout", "plain", 0.5),
    ("lora_ga_config", "plain", {"direction": "ArB2r"}),
    ("megatron_config", "plain", {"tensor_model_parallel_size": 1}),
    ("megatron_core", "plain", "other.core"),
    ("modules_to_save", "plain", ["norm"]),
    ("modules_to_save", "saved", None),
    ("monteclora_config", "plain", {"num_samples": 4}),
    ("peft_type", "plain", "LOHA"),
    ("peft_version", "plain", "0.19.1"),
    ("peft_version", "ranks", "0.18.0"),
    ("qalora_group_size", "plain", 3),
    ("r", "plain", 3),
    ("rank_pattern", "plain", {"q": 5}),
    ("rank_pattern", "ranks", {}),
    ("revision", "plain", "main"),
    ("target_modules", "plain", ["q"]),
    ("target_modules", "plain", r".*layers\.0.*(q|v)"),
    ("target_modules", "plain", ["q", "v", "head"]),
    ("target_parameters", "experts", None),
    ("target_parameters", "plain", ["experts.weight"]),
    ("task_type", "plain", "CAUSAL_LM"),
    ("task_type", "plain", "FEATURE_EXTRACTION"),
    ("trainable_token_indices", "tokens", [2, 5]),
    ("trainable_token_indices", "tokens", {"embed": [0, 9]}),
    ("trainable_token_indices", "tokens", [5, 2, 1]),
    ("trainable_token_indices", "tokens", None),
    ("use_bdlora", "plain", {"nblocks": 2, "target_modules_bd_a": ["q"], "target_modules_bd_b": ["v"]}),
    ("use_dora", "dora", False),
    ("use_dora", "plain", True),
    ("use_qalora", "plain", True),
    ("use_rslora", "plain", True),
    ("use_rslora", "ranks", True),
    ("velora_config", "plain", {"num_groups": 2}),
]


def base() -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "body.norm.weight":
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.5)
    save_file(model.state_dict(), "base.safetensors")


def load() -> Net:
    model = Net()
    model.load_state_dict(load_file(HERE / "base.safetensors"))
    return model.eval()


def as_if_trained(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "lora_magnitude" in name:
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
            else:
                parameter.data += torch.empty_like(parameter).normal_(0.0, 0.4)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).clone().contiguous()


if __name__ == "__main__":
    # PEFT writes sets as lists, in the order of their hashes.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    os.chdir(HERE)
    warnings.simplefilter("ignore")
    base()
    outputs = {"input": TOKENS, "base": output(load())}
    for name, config in SETS.items():
        torch.manual_seed(1)
        model = get_peft_model(load(), LoraConfig(r=2, lora_alpha=5, **config)).eval()
        as_if_trained(model)
        outputs[name] = output(model)
        model.save_pretrained(name)
        pathlib.Path(name, "README.md").unlink()
        torch.testing.assert_close(output(PeftModel.from_pretrained(load(), name).eval()), outputs[name], rtol=0, atol=0)
    listed = []
    for number, (key, name, value) in enumerate(VARIANTS):
        with tempfile.TemporaryDirectory() as dir:
            shutil.copytree(name, dir, dirs_exist_ok=True)
            path = pathlib.Path(dir, "adapter_config.json")
            config = json.loads(path.read_text())
            assert key in config, key
            config[key] = value
            if key == "layers_pattern":
                config["layers_to_transform"] = [1]
            path.write_text(json.dumps(config))
            torch.manual_seed(2)
            error = None
            try:
                found = output(PeftModel.from_pretrained(load(), dir).eval())
                # A fresh part that is random says nothing of the key.
                torch.manual_seed(3)
                again = output(PeftModel.from_pretrained(load(), dir).eval())
                if torch.equal(found, again):
                    outputs[f"variant.{number}"] = found
                else:
                    error = "random"
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}".replace(dir, "DIR")[:200]
            listed.append({"key": key, "set": name, "value": value, "error": error})
            same = f"variant.{number}" in outputs and torch.equal(outputs[f"variant.{number}"], outputs[name])
            print(key, name, json.dumps(value), "|", error or ("same" if same else "other outputs"))
    keys = sorted(field.name for field in dataclasses.fields(LoraConfig) if field.name != "runtime_config")
    pathlib.Path("keys.json").write_text(json.dumps({"keys": keys, "variants": listed}, indent=1) + "\n")
    save_file(outputs, "outputs.safetensors")
    print("peft", peft.__version__, "torch", torch.__version__, len(keys))
