"""Makes the fixtures of adapters on GPT-2, whose `Conv1D` holds weights as [d_in, d_out]. Run: python tests/golden/conv1d/generate.py

    base.safetensors            a GPT-2 of one block, as transformers saves it
    <case>/                     adapter of PEFT, as `save_pretrained` wrote it, less its README.md; every value as if trained
    <case>/outputs.safetensors  tokens I64 [1, 5] and the logits F32 of the model that was saved

`copies` has square weights of `Conv1D` among its saved modules, whose layout no shape tells. `resized` and `resized-lora` were trained with
18 tokens in place of 16. The logits are checked against those of the adapter when PEFT loads it again. All arithmetic is f32.
"""

import os
import pathlib
import sys
import tempfile
import warnings

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

HERE = pathlib.Path(__file__).parent
TOKENS = torch.tensor([[1, 5, 2, 9, 15]])

CASES = {
    "factors": (16, dict(target_modules=["c_attn", "c_fc"])),
    "dora": (16, dict(target_modules=["c_attn", "c_proj"], use_dora=True)),
    "copies": (16, dict(target_modules=["c_attn"], modules_to_save=["attn.c_proj", "c_fc"])),
    "bias": (16, dict(target_modules=["c_attn"], bias="all")),
    "lookup": (16, dict(target_modules=["c_attn", "wte"])),
    "resized": (18, dict(target_modules=["c_attn"])),
    "resized-lora": (18, dict(target_modules=["c_attn", "wte"])),
}


def make() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.4)
    return model.eval()


def as_if_trained(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "lora_magnitude" in name:
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
            else:
                parameter.data += torch.empty_like(parameter).normal_(0.0, 0.3)


def load(base: str, tokens: int) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32).eval()
    if tokens != model.config.vocab_size:
        torch.manual_seed(7)
        model.resize_token_embeddings(tokens)
    return model


if __name__ == "__main__":
    # PEFT writes sets as lists, in the order of their hashes.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    os.chdir(HERE)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as base:
        make().save_pretrained(base)
        pathlib.Path("base.safetensors").write_bytes(pathlib.Path(base, "model.safetensors").read_bytes())
        for name, (tokens, config) in CASES.items():
            torch.manual_seed(1)
            model = get_peft_model(load(base, tokens), LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **config)).eval()
            as_if_trained(model)
            with torch.no_grad():
                logits = model(TOKENS).logits
            model.save_pretrained(name)
            pathlib.Path(name, "README.md").unlink()
            # Not where it was.
            text = pathlib.Path(name, "adapter_config.json").read_text().replace(base, "gpt2")
            pathlib.Path(name, "adapter_config.json").write_text(text)
            with torch.no_grad():
                again = PeftModel.from_pretrained(load(base, tokens), name).eval()(TOKENS).logits
            torch.testing.assert_close(again, logits, rtol=0, atol=0)
            save_file({"tokens": TOKENS, "logits": logits.clone()}, f"{name}/outputs.safetensors")
            print(name, sorted(p.name for p in pathlib.Path(name).iterdir()))
    print("peft", peft.__version__, "torch", torch.__version__)
