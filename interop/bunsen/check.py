"""Reads with Python what the tests have written: adapters with PEFT, merged bases with the library that the model is of.

    INTEROP_OUT=OUT cargo test --release      # in interop/bunsen
    python interop/bunsen/check.py OUT

For each model, `OUT/<model>/<case>/` holds `logits.safetensors`, what the tests computed, and an adapter or a base. It is an error if
PEFT misses a key, finds one too many or warns of anything; if an adapter changes nothing; or if Python's outputs differ from the tests'
by more than 2e-4. Adapters that were trained over packed weights are put on weights that bitsandbytes has packed and restored.
"""

import pathlib
import sys
import warnings

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from generate import DATA, HEADS, in_nf4
from models import MODELS, logits

LARGEST_DIFFERENCE = 2e-4
SMALLEST_EFFECT = 2e-2
ADAPTERS = ["resaved", "trained", "trained_nf4", "learned"]


def with_adapter(base: torch.nn.Module, directory: pathlib.Path) -> PeftModel:
    """The adapter on the base, of which no key is missing or too many."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, directory).eval()
        # The same under another name, because only this call returns what it missed.
        result = model.load_adapter(directory, "again")
    assert not result.missing_keys, f"missing: {result.missing_keys}"
    assert not result.unexpected_keys, f"unexpected: {result.unexpected_keys}"
    stored = load_file(directory / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == stored.keys(), f"{sorted(loaded.keys() ^ stored.keys())}"
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), f"{name}: the values differ"
    return model


def merged(name: str, directory: pathlib.Path) -> torch.nn.Module:
    """A base that the tests have written."""
    if name != "resnet":
        return MODELS[name](directory)
    model = MODELS[name]()
    missing, unexpected = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    # A count that nothing is computed from.
    missing = [key for key in missing if not key.endswith(".num_batches_tracked")]
    assert not missing and not unexpected, f"missing: {missing}, unexpected: {unexpected}"
    return model


def check(name: str, case: str, directory: pathlib.Path) -> str:
    golden = load_file(DATA / name / "golden.safetensors")
    base = MODELS[name](DATA / name)
    if case == "trained_nf4":
        base = in_nf4(base, HEADS[name])
    plain = logits(name, base, golden)
    model = merged(name, directory) if case == "merged" else with_adapter(base, directory)
    ours = load_file(directory / "logits.safetensors")["logits"]
    theirs = logits(name, model, golden)
    difference, effect = ((theirs - other).abs().max().item() for other in (ours, plain))
    # Written so that NaN fails.
    assert effect > SMALLEST_EFFECT, f"no output changes by more than {effect:.2e}"
    assert difference <= LARGEST_DIFFERENCE, f"outputs differ by {difference:.2e}"
    return f"largest difference {difference:.1e}, effect {effect:.2f}"


if __name__ == "__main__":
    out, failed = pathlib.Path(sys.argv[1]), False
    for name in MODELS:
        for case in [*ADAPTERS, "merged"]:
            try:
                print(f"{name} {case}: {check(name, case, out / name / case)}")
            except (AssertionError, OSError, RuntimeError, UserWarning, ValueError) as error:
                print(f"{name} {case}: FAILED: {error}")
                failed = True
    sys.exit(failed)
