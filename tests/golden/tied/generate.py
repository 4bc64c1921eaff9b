"""Makes the fixtures of adapters on a Llama whose head shares the weight of its embedding. Run: python tests/golden/tied/generate.py

    base/                       the model: config.json and model.safetensors
    tied.json                   [{name, target, ensure_weight_tying, lookup, head}]: the cases, and whether each changes the two
    <case>/                     adapter of PEFT, as `save_pretrained` wrote it, less its README.md; every value as if trained
    <case>/outputs.safetensors  tokens I64 [1, 4]; logits F32 of the model that was saved; `embedding` and `head` F32 [16, 8], what the
                                two modules compute with; `weights` [1, 4, 16], and `gradient.<key>`, the gradient of sum(weights · logits)
                                by the tensor of that key in the adapter's file

The logits are checked against those of the adapter when PEFT loads it again. Combinations that PEFT 0.21.2 refuses or cannot run are
not here: other trained tokens for each of the two with `ensure_weight_tying`; trained tokens of the embedding beside a saved head.
All arithmetic is f32.
"""

import json
import os
import pathlib
import sys
import warnings

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

HERE = pathlib.Path(__file__).parent
TOKENS = torch.tensor([[1, 5, 2, 9]])
EMBED, HEAD, Q = "embed_tokens", "lm_head", "q_proj"

# What an adapter has, by name.
CASES = {
    "lora-embedding": dict(target_modules=[Q, EMBED]),
    "lora-head": dict(target_modules=[Q, HEAD]),
    "lora-both": dict(target_modules=[Q, EMBED, HEAD]),
    "dora-embedding": dict(target_modules=[Q, EMBED], use_dora=True),
    "dora-head": dict(target_modules=[Q, HEAD], use_dora=True),
    "bias-head": dict(target_modules=[Q, HEAD], lora_bias=True),
    "copy-embedding": dict(target_modules=[Q], modules_to_save=[EMBED]),
    "copy-head": dict(target_modules=[Q], modules_to_save=[HEAD]),
    "copy-both": dict(target_modules=[Q], modules_to_save=[EMBED, HEAD]),
    "tokens": dict(target_modules=[Q], trainable_token_indices=[5, 2]),
    "tokens-embedding": dict(target_modules=[Q], trainable_token_indices={EMBED: [5, 2]}),
    "tokens-head": dict(target_modules=[Q], trainable_token_indices={HEAD: [5, 2]}),
    "tokens-both": dict(target_modules=[Q], trainable_token_indices={EMBED: [5, 2], HEAD: [5, 2]}),
    "tokens-other": dict(target_modules=[Q], trainable_token_indices={EMBED: [5, 2], HEAD: [3, 2]}),
    "lora-embedding-copy-head": dict(target_modules=[Q, EMBED], modules_to_save=[HEAD]),
    "copy-embedding-lora-head": dict(target_modules=[Q, HEAD], modules_to_save=[EMBED]),
    "tokens-embedding-lora-head": dict(target_modules=[Q, HEAD], trainable_token_indices={EMBED: [5, 2]}),
    "lora-embedding-tokens-head": dict(target_modules=[Q, EMBED], trainable_token_indices={HEAD: [5, 2]}),
}


def base() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.5)
    model.save_pretrained("base")
    pathlib.Path("base/generation_config.json").unlink(missing_ok=True)


def load() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained("base", dtype=torch.float32).eval()


def as_if_trained(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "lora_magnitude" in name:
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
            else:
                parameter.data += torch.empty_like(parameter).normal_(0.0, 0.3)


def weights_of(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the lookup and the head compute with."""
    core = model.get_base_model()
    with torch.no_grad():
        embedding = core.get_input_embeddings()(torch.arange(16)[None])[0]
        head = core.get_output_embeddings()(torch.eye(8)[None])[0]
        zero = core.get_output_embeddings()(torch.zeros(1, 1, 8))[0]
    return embedding.clone().contiguous(), (head - zero).T.clone().contiguous()


def gradients(model: torch.nn.Module, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    (model(TOKENS).logits * weights).sum().backward()
    # PEFT ties factors of embedding and head by their memory, each with a gradient of its own use: what trains both is the sum.
    trained = {}
    for p in model.parameters():
        if p.requires_grad and p.grad is not None:
            trained.setdefault(p.data_ptr(), []).append(p)
    total = lambda of, shape: sum(p.grad if p.shape == shape else p.grad.T for p in trained[of])
    stored = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        f"gradient.{key}": total(tensor.data_ptr(), tensor.shape).clone().contiguous()
        for key, tensor in stored.items()
        if tensor.data_ptr() in trained
    }


def adapter(name: str, config: dict, tie: bool) -> dict | None:
    torch.manual_seed(1)
    original = load().model.embed_tokens.weight.detach()
    lora = LoraConfig(**(dict(r=2, lora_alpha=4, task_type="CAUSAL_LM", ensure_weight_tying=tie) | config))
    try:
        model = get_peft_model(load(), lora).eval()
        as_if_trained(model)
        with torch.no_grad():
            logits = model(TOKENS).logits
    except (ValueError, TypeError) as error:
        print(name, tie, "refused by PEFT:", error)
        return None
    embedding, head = weights_of(model)
    model.save_pretrained(name)
    pathlib.Path(name, "README.md").unlink()
    with torch.no_grad():
        again = PeftModel.from_pretrained(load(), name).eval()(TOKENS).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
    weights = torch.randn(1, 4, 16)
    outputs = {"tokens": TOKENS, "logits": logits.clone(), "embedding": embedding, "head": head, "weights": weights}
    save_file(outputs | gradients(model, weights), f"{name}/outputs.safetensors")
    changed = lambda x: not torch.allclose(x, original, atol=1e-6)
    return {
        "name": name, "ensure_weight_tying": tie, "lookup": changed(embedding), "head": changed(head),
        "alike": torch.allclose(embedding, head, atol=1e-6),
        "keys": sorted(load_file(f"{name}/adapter_model.safetensors")),
    }


if __name__ == "__main__":
    # PEFT writes sets as lists, in the order of their hashes.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    os.chdir(HERE)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    base()
    listed = []
    for name, config in CASES.items():
        for tie in (False, True):
            case = adapter(f"{name}-tied" if tie else name, config, tie)
            if case is not None:
                listed.append(case)
                print(*[f"{key}={value}" for key, value in case.items() if key != "keys"])
    pathlib.Path("tied.json").write_text(json.dumps(listed, indent=1) + "\n")
    print("peft", peft.__version__, "torch", torch.__version__)
