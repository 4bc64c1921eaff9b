"""Checks adapters of every kind of layer and parameter with Python's PEFT (0.21 or later, torch, transformers).

    python scripts/check_kinds.py DIR

DIR holds `kinds.json`, [{name, what, adapter, base}], and for each case the adapter, in the folder `adapter`, and
`NAME/outputs.safetensors` with `tokens` (I64) and `adapted`, the output that the writer of the adapter got (F32). `base` is
`kinds` (also when it is absent), `kinds-transposed`, `tied` or `untied`, see tests/golden/kinds/generate.py, whose own folder is
such a DIR. Everything is computed in f32. It is an error if

* PEFT misses a key, finds one too many, or warns of anything when it loads the adapter, except that it cannot merge groups;
* a tensor that PEFT loaded differs from the file's, or a factor of LoRA is zero;
* PEFT's output differs from `adapted` by more than 2e-4 anywhere, or nowhere from the base's by more than 1e-2.

The last line is the verdict; the exit status is 0 only if all cases held.
"""

import argparse
import json
import pathlib
import sys
import warnings

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from check_with_peft import LARGEST_DIFFERENCE, SMALLEST_EFFECT

GOLDEN = pathlib.Path(__file__).parent.parent / "tests/golden"
sys.path.insert(0, str(GOLDEN / "kinds"))

import model as kinds  # noqa: E402

# PEFT says this of every adapter on a grouped convolution, also of its own.
GROUPS = ".*groups > 1. Merging is not supported"


def load_base(name: str) -> torch.nn.Module:
    if name in ("tied", "untied"):
        return AutoModelForCausalLM.from_pretrained(GOLDEN / "llama" / name, dtype=torch.float32).eval()
    return kinds.load({"kinds": False, "kinds-transposed": True}[name])


def output(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens)
    return getattr(found, "logits", found)


def is_surplus(key: str) -> bool:
    """Keys of `modules_to_save` that PEFT writes with `bias="all"` needlessly: the base's bias, and one that it cannot read."""
    return ".original_module." in key or ".modules_to_save." in key


def is_base(key: str) -> bool:
    """An embedding's own weight, which PEFT writes when `save_embedding_layers` is set."""
    return key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))


def check_keys(model: PeftModel, adapter: pathlib.Path) -> int:
    """The file's tensors are exactly those of the model, and in it."""
    stored = load_file(adapter / "adapter_model.safetensors")
    with warnings.catch_warnings():
        # PEFT takes every bias of a factor B for a damaged factor.
        warnings.simplefilter("ignore")
        loaded = get_peft_model_state_dict(model, save_embedding_layers=any(map(is_base, stored)))
    missing = sorted(key for key in loaded.keys() - stored.keys() if not is_surplus(key))
    unexpected = sorted(stored.keys() - loaded.keys())
    assert not missing, f"keys of PEFT that the file lacks: {missing}"
    assert not unexpected, f"keys of the file that PEFT lacks: {unexpected}"
    for name, tensor in stored.items():
        if not name.endswith(".modules_to_save.bias"):
            assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), f"{name}: the values differ"
        if ".lora_" in name:
            assert tensor.count_nonzero() > 0, f"{name} is zero"
    return len(stored)


def check_load(base: str, adapter: pathlib.Path) -> None:
    """What PEFT itself reports of missing and unexpected keys."""
    # Into an adapter that is already there, because only this call returns what it missed, and PEFT refuses a second adapter
    # with trained biases.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_base(base), PeftConfig.from_pretrained(adapter))
        result = model.load_adapter(adapter, "default")
    unexpected = [key for key in result.unexpected_keys if not is_surplus(key)]
    assert not result.missing_keys, f"missing: {result.missing_keys}"
    assert not unexpected, f"unexpected: {unexpected}"


def check(base: str, adapter: pathlib.Path, outputs: pathlib.Path) -> tuple[int, float, float]:
    """The number of tensors, and the largest differences of outputs: the file's from PEFT's, and PEFT's from the base's."""
    outputs = load_file(outputs)
    tokens, ours = outputs["tokens"], outputs["adapted"]
    model = load_base(base)
    plain = output(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", GROUPS)
        if PeftConfig.from_pretrained(adapter).target_parameters:
            # It does not count parameters among the modules that a pattern may match, although it does heed the pattern.
            warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module")
        model = PeftModel.from_pretrained(model, adapter).eval()
    adapted = output(model, tokens)
    keys = check_keys(model, adapter)
    check_load(base, adapter)
    assert ours.shape == adapted.shape, f"output of shape {list(ours.shape)}, PEFT's has {list(adapted.shape)}"
    assert ours.dtype == torch.float32, f"output of type {ours.dtype}"
    difference = (ours - adapted).abs().max().item()
    effect = (adapted - plain).abs().max().item()
    # Written so that NaN fails.
    assert effect > SMALLEST_EFFECT, f"the adapter changes no output by more than {effect:.2e}"
    assert difference <= LARGEST_DIFFERENCE, f"outputs differ from PEFT's by {difference:.2e}"
    return keys, difference, effect


def row(case: dict, directory: pathlib.Path) -> tuple[str, bool]:
    """A line of the table, and whether the case held."""
    try:
        outputs = directory / case["name"] / "outputs.safetensors"
        keys, difference, effect = check(case.get("base", "kinds"), directory / case["adapter"], outputs)
        result, held = f"{keys} | {difference:.1e} | {effect:.1f} | holds", True
    # Whatever PEFT raises for a file that it cannot read is the finding.
    except Exception as error:  # noqa: BLE001
        text = " ".join(str(error).split()).replace("|", "\\|")
        result, held = f" | | | FAILED: {type(error).__name__}: {text}", False
    return f"| `{case['name']}` | {case['what']} | {result} |\n", held


def rows(directory: pathlib.Path) -> list[tuple[str, bool]]:
    """A line of the table for each case of `kinds.json`."""
    return [row(case, directory) for case in json.loads((directory / "kinds.json").read_text())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    found = rows(parser.parse_args().directory)
    failed = sum(not held for _, held in found)
    print("".join(line for line, _ in found), end="")
    print(f"FAILED: {failed} of {len(found)}" if failed else f"OK: {len(found)} adapters")
    sys.exit(1 if failed or not found else 0)
