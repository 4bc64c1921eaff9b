"""Compares the logits of a Hugging Face Llama between transformers and the `logits` example.

    pip install torch transformers safetensors peft
    python scripts/check_logits.py DIR [--adapter DIR] [--tolerance 5e-4] [--text TEXT ...]

Every text runs alone through both, in f32, with PEFT's reading of the adapter on the one side and ours on the other. The script fails if a logit differs by more than the tolerance or if the
most likely next token differs anywhere.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = [
    "The capital of France is",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "fn main() {\n    let numbers = vec![3, 1, 4, 1, 5, 9, 2, 6];\n    println!(\"{}\", numbers.iter().sum::<i32>());\n}\n",
    "Package: coreutils\nDescription: GNU core utilities\n This package contains the basic file, shell and text "
    "manipulation utilities which are expected to exist on every operating system. " * 6,
]


def build() -> str:
    """Builds the example and returns its executable."""
    command = ["cargo", "build", "--release", "--example", "logits", "--message-format", "json"]
    lines = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    artefacts = (json.loads(line) for line in lines)
    return next(a["executable"] for a in artefacts if a.get("executable") and a["target"]["name"] == "logits")


def logits_of_example(example: str, options: list[str], tokens: torch.Tensor) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as scratch:
        source, target = f"{scratch}/in.safetensors", f"{scratch}/out.safetensors"
        save_file({"input_ids": tokens}, source)
        subprocess.run([example, *options, "--tokens", source, "--out", target], check=True)
        return load_file(target)["logits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    # SmolLM2's logits reach about 40. 30 layers of sums of up to 1536 terms in another order leave 1e-5 of that.
    parser.add_argument("--tolerance", type=float, default=5e-4)
    parser.add_argument("--text", action="append")
    parser.add_argument("--adapter", type=pathlib.Path)
    parser.add_argument("--example", help="the built example, in place of building it")
    args = parser.parse_args()

    example = args.example or build()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    options = ["--model", str(args.model)]
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter).eval()
        options += ["--adapter", str(args.adapter)]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    worst = 0.0
    for text in args.text or TEXTS:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(tokens).logits
        found = logits_of_example(example, options, tokens)
        assert found.shape == expected.shape, (found.shape, expected.shape)
        difference = (found - expected).abs().max().item()
        assert torch.equal(found.argmax(-1), expected.argmax(-1)), f"another token is the most likely: {text!r}"
        print(
            f"{tokens.shape[1]:4d} tokens, largest logit {expected.abs().max().item():.2f}, "
            f"largest difference {difference:.2e}: {text[:40]!r}"
        )
        worst = max(worst, difference)
    assert worst <= args.tolerance, f"{worst} > {args.tolerance}"


if __name__ == "__main__":
    main()
