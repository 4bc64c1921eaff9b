"""Checks an adapter that this crate wrote with Python's PEFT (0.21 or later, torch, transformers).

    cargo run --release --example logits -- --model BASE --adapter ADAPTER --tokens TOKENS --out LOGITS
    python scripts/check_with_peft.py BASE ADAPTER TOKENS LOGITS

BASE is a Hugging Face directory, ADAPTER the directory written, TOKENS holds `input_ids` (I64, [batch, seq]) and LOGITS
`logits` (F32, [batch, seq, vocab]), both safetensors. Everything is computed in f32. It is an error if

* PEFT misses a key, finds one too many, or warns of anything when it loads the adapter;
* a tensor that PEFT loaded differs from the file's, or a factor B is zero;
* PEFT's logits differ from LOGITS by more than 2e-4 anywhere, or nowhere from the base's by more than 1e-2.

The last line is the verdict; the exit status is 0 only if all held.
"""

import argparse
import pathlib
import sys
import warnings

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LARGEST_DIFFERENCE = 2e-4
SMALLEST_EFFECT = 1e-2


def check_keys(model: PeftModel, adapter: pathlib.Path) -> int:
    """The file's tensors are exactly those of the model, and in it."""
    stored = load_file(adapter / "adapter_model.safetensors")
    # With a target that is an embedding or the head, PEFT would add the base's own weight.
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, unexpected = sorted(loaded.keys() - stored.keys()), sorted(stored.keys() - loaded.keys())
    assert not missing, f"keys of PEFT that the file lacks: {missing}"
    assert not unexpected, f"keys of the file that PEFT lacks: {unexpected}"
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), f"{name}: the values differ"
        if ".lora_B." in name:
            assert tensor.count_nonzero() > 0, f"{name}: B is zero"
    # The same adapter under another name, because only this call returns what it missed.
    result = model.load_adapter(adapter, "again")
    assert not result.missing_keys, f"missing: {result.missing_keys}"
    assert not result.unexpected_keys, f"unexpected: {result.unexpected_keys}"
    return len(stored)


def check(base: pathlib.Path, adapter: pathlib.Path, tokens: pathlib.Path, logits: pathlib.Path) -> tuple[int, float, float]:
    """The number of tensors, and the largest differences of logits: ours from PEFT's, and PEFT's from the base's."""
    tokens = load_file(tokens)["input_ids"]
    ours = load_file(logits)["logits"]
    base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(tokens).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = PeftModel.from_pretrained(base, adapter).eval()
        adapted = model(tokens).logits
    keys = check_keys(model, adapter)
    assert ours.shape == adapted.shape, f"logits of shape {list(ours.shape)}, PEFT's have {list(adapted.shape)}"
    assert ours.dtype == torch.float32, f"logits of type {ours.dtype}"
    difference = (ours - adapted).abs().max().item()
    effect = (adapted - plain).abs().max().item()
    # Written so that NaN fails.
    assert effect > SMALLEST_EFFECT, f"the adapter changes no logit by more than {effect:.2e}"
    assert difference <= LARGEST_DIFFERENCE, f"logits differ from PEFT's by {difference:.2e}"
    return keys, difference, effect


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "tokens", "logits"):
        parser.add_argument(name, type=pathlib.Path)
    try:
        keys, difference, effect = check(**vars(parser.parse_args()))
        print(f"OK: {keys} tensors, none missing or unexpected; largest difference {difference:.2e}, effect {effect:.2e}")
    except (AssertionError, UserWarning) as error:
        print("FAILED:", error)
        sys.exit(1)
