"""Makes the fixtures of PEFT. Run: python tests/golden/peft/generate.py (after tests/golden/llama/generate.py)

    lora_linear.safetensors   one LoRA layer: inputs, factors, output and gradients of several cases; the header's
                              metadata key `cases` is JSON: name -> {r, lora_alpha, use_rslora, use_dora}; of DoRA also the
                              magnitude, its gradient and the merged weight
    lora/                     adapter of PEFT on ../llama/untied: all linear layers, alpha != r
    rslora/                   the same base: rsLoRA with rank_pattern and alpha_pattern, without a task type
    regex/                    on ../llama/tied: target_modules is an expression with look-ahead, factors in bf16;
                              the adapter's name is `regex`, so PEFT puts it into a folder of that name
    dora/                     on ../llama/tied: DoRA
    pissa/, olora/            on ../llama/tied, not converted: PEFT has moved the initial product out of the base
    <name>/logits.safetensors input_ids I64 [2, 12], base and adapted F32 [2, 12, vocab]

Each adapter directory is as `save_pretrained` wrote it, less its README.md. All arithmetic is f32.
"""

import json
import os
import pathlib
import sys

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
VOCAB = 96


def randomize(model: torch.nn.Module, scale: float) -> None:
    """PEFT begins with B = 0, which would hide every mistake in A and in the scale."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        elif "lora_" in name:
            parameter.data.normal_(0.0, scale)


def linear_case(
    x_shape, d_out: int, r: int, alpha: int, rslora: bool, bias: bool, dora: bool = False
) -> dict[str, torch.Tensor]:
    net = torch.nn.Sequential(torch.nn.Linear(x_shape[-1], d_out, bias=bias))
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, use_dora=dora, target_modules=["0"])
    model = get_peft_model(net, config)
    randomize(model, 0.3)
    layer = model.base_model.model[0]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, dy = torch.randn(x_shape, requires_grad=True), torch.randn(*x_shape[:-1], d_out)
    if bias:
        layer.base_layer.bias.requires_grad_()
    y = model(x)
    y.backward(dy)
    tensors = {
        "weight": layer.base_layer.weight, "lora_A": lora_a, "lora_B": lora_b, "x": x, "dy": dy, "y": y,
        "dx": x.grad, "dlora_A": lora_a.grad, "dlora_B": lora_b.grad,
    }
    if bias:
        tensors |= {"bias": layer.base_layer.bias, "dbias": layer.base_layer.bias.grad}
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        tensors |= {"magnitude": magnitude, "dmagnitude": magnitude.grad}
        layer.merge()
        tensors["merged"] = layer.base_layer.weight
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def linear() -> None:
    torch.manual_seed(0)
    cases = {
        "plain": dict(x_shape=(5, 16), d_out=24, r=4, alpha=7, rslora=False, bias=True),
        "rslora_3d": dict(x_shape=(2, 3, 32), d_out=20, r=8, alpha=5, rslora=True, bias=True),
        "no_bias_3d": dict(x_shape=(3, 4, 10), d_out=14, r=2, alpha=3, rslora=False, bias=False),
        "rank_above_both": dict(x_shape=(4, 6), d_out=5, r=12, alpha=9, rslora=True, bias=True),
        "dora": dict(x_shape=(5, 16), d_out=24, r=4, alpha=7, rslora=False, bias=True, dora=True),
        "dora_rslora_3d": dict(x_shape=(2, 3, 150), d_out=20, r=8, alpha=5, rslora=True, bias=False, dora=True),
    }
    tensors = {}
    for name, case in cases.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in linear_case(**case).items()}
    settings = {
        name: {
            "r": case["r"], "lora_alpha": case["alpha"], "use_rslora": case["rslora"],
            "use_dora": case.get("dora", False),
        }
        for name, case in cases.items()
    }
    save_file(tensors, HERE / "lora_linear.safetensors", metadata={"cases": json.dumps(settings)})


def adapter(name: str, base: str, adapter_name: str, bf16: bool, config: LoraConfig) -> None:
    torch.manual_seed(1)
    # A relative path, because PEFT writes it into the configuration.
    llama = LlamaForCausalLM.from_pretrained(f"../llama/{base}", dtype=torch.float32).eval()
    tokens = torch.randint(0, VOCAB, (2, 12))
    with torch.no_grad():
        plain = llama(tokens).logits
        model = get_peft_model(llama, config, adapter_name=adapter_name).eval()
        randomize(model, 0.1)
        factors = [parameter for key, parameter in model.named_parameters() if "lora_" in key]
        for factor in factors if bf16 else []:
            factor.data = factor.data.bfloat16().float()
        adapted = model(tokens).logits
        for factor in factors if bf16 else []:
            factor.data = factor.data.bfloat16()
    model.save_pretrained("." if adapter_name == name else name)
    for readme in (pathlib.Path("README.md"), pathlib.Path(name) / "README.md"):
        readme.unlink(missing_ok=True)
    difference = (adapted - plain).abs().max().item()
    assert difference > 1e-2, (name, difference)
    golden = {"input_ids": tokens, "base": plain.contiguous(), "adapted": adapted.contiguous()}
    save_file(golden, f"{name}/logits.safetensors")
    print(name, "largest difference from the base", difference)


if __name__ == "__main__":
    # PEFT writes sets as lists, in the order of their hashes.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    os.chdir(HERE)
    HERE = pathlib.Path(".")
    torch.use_deterministic_algorithms(True)
    linear()
    adapter(
        "lora", "untied", "default", False,
        LoraConfig(r=4, lora_alpha=7, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapter(
        "rslora", "untied", "default", False,
        LoraConfig(
            r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
            exclude_modules=["layers.1.self_attn.v_proj"],
            # Both keys match layers.0.self_attn.q_proj, and the first one wins. PEFT sorts them on saving.
            rank_pattern={"layers.0.self_attn.q_proj": 6, r"self_attn\.[qo]_proj": 2},
            alpha_pattern={"down_proj": 11, r"layers\.1\..*": 2.5},
        ),
    )
    adapter(
        "regex", "tied", "regex", True,
        LoraConfig(
            r=2, lora_alpha=3, target_modules=r"model\.layers\.\d+\.(?!self_attn\.k).*_proj", task_type="CAUSAL_LM",
            init_lora_weights="gaussian",
        ),
    )
    adapter(
        "dora", "tied", "default", False,
        LoraConfig(
            r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
        ),
    )
    for init in ("pissa", "olora"):
        adapter(
            init, "tied", "default", False,
            LoraConfig(
                r=3, lora_alpha=5, init_lora_weights=init, target_modules=["q_proj", "v_proj", "down_proj"],
                rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM",
            ),
        )
    print("peft", peft.__version__, "torch", torch.__version__)
