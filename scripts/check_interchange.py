"""Checks with Python's PEFT an adapter of every option that this crate writes, and writes the tables of docs/interchange.md.

    python scripts/check_interchange.py

Needs cargo, peft, torch and transformers. The bases are the small Llama and the small model of every kind of layer of the
tests. `examples/interchange.rs` writes the adapters, those of the second model into the folder `kinds`, with a list
`kinds.json`; `check_with_peft.py` and `check_kinds.py` say what is checked of each. The exit status is 0 only if all cases held;
the tables are written in any case.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import peft
import torch
import transformers

from check_kinds import rows as kinds_rows
from check_with_peft import check

ROOT = pathlib.Path(__file__).parent.parent
BASE = ROOT / "tests/golden/llama/untied"
TABLE = ROOT / "docs/interchange.md"

HEAD = """# Adapters that PEFT reads as they were meant

An adapter of every option, written by this crate for a Llama of 2 layers in f32 and read by PEFT {peft} (torch {torch},
transformers {transformers}). Each was checked by `scripts/check_with_peft.py`: PEFT loads it without a warning, its keys are
exactly PEFT's own, its values are the file's, and PEFT's logits are this crate's within 2e-4 while the adapter moves them by
more than 1e-2. `python scripts/check_interchange.py` makes this table.

What PEFT wrote, this crate reads to the same outputs: `tests/files/model.rs`, `golden.rs` and `kinds.rs` hold that, on
directories that `tests/golden/peft/generate.py` and `tests/golden/kinds/generate.py` made; `kinds.rs` compares gradients and merges too.

| Case | What it has | Tensors | Logits differ by | Adapter moves them by | |
|---|---|---|---|---|---|
"""

KINDS = """
## Every kind of layer and parameter

Embeddings, convolutions, biases, whole modules, trained tokens and experts, on the small model of
`tests/golden/kinds/model.py`, or on a Llama where the name says so. `scripts/check_kinds.py` checked the same of each, with the
model's outputs for the logits.

| Case | What it has | Tensors | Outputs differ by | Adapter moves them by | |
|---|---|---|---|---|---|
"""


def row(case: dict, out: pathlib.Path) -> tuple[str, bool]:
    try:
        logits = out / case["name"] / "logits.safetensors"
        keys, difference, effect = check(BASE, out / case["adapter"], out / "tokens.safetensors", logits)
        result, held = f"{keys} | {difference:.1e} | {effect:.1f} | holds", True
    except (AssertionError, UserWarning, ValueError, RuntimeError) as error:
        result, held = f" | | | FAILED: {error}", False
    return f"| `{case['name']}` | {case['what']} | {result} |\n", held


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch)
        command = ["cargo", "run", "--release", "--example", "interchange", "--"]
        command += ["--model", BASE, "--kinds", ROOT / "tests/golden/kinds", "--out", out]
        subprocess.run(command, cwd=ROOT, check=True)
        rows = [row(case, out) for case in json.loads((out / "cases.json").read_text())]
        kinds = kinds_rows(out / "kinds")
    versions = {"peft": peft.__version__, "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    text = HEAD.format(**versions) + "".join(line for line, _ in rows) + KINDS + "".join(line for line, _ in kinds)
    TABLE.write_text(text)
    print(text)
    sys.exit(0 if all(held for _, held in rows + kinds) else 1)


if __name__ == "__main__":
    main()
