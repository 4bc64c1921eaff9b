"""Writes sft.json: PyTorch's summed cross entropy and its gradient on small batches.

Needs torch; run `python generate.py` in this directory. tests/sft.rs reads the result.
"""

import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

BATCH, SEQ, VOCAB = 2, 5, 7
IGNORED = -100


def case(name, logits, mask, targets):
    labels = targets.masked_fill(~mask, IGNORED)
    # In f64 from the f32 values, so that the expectation has no rounding of its own.
    leaf = logits.double().requires_grad_()
    loss = cross_entropy(leaf.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    loss.backward()
    return {
        "name": name,
        "shape": list(logits.shape),
        "logits": logits.flatten().tolist(),
        "targets": targets.flatten().tolist(),
        "mask": mask.flatten().tolist(),
        "sum": loss.item(),
        "gradient": leaf.grad.flatten().tolist(),
    }


def main():
    torch.manual_seed(0)
    shape = (BATCH, SEQ, VOCAB)
    targets = torch.randint(VOCAB, shape[:2])
    some = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]], dtype=torch.bool)
    every = torch.ones(shape[:2], dtype=torch.bool)
    one = torch.zeros(shape[:2], dtype=torch.bool)
    one[1, 4] = True
    logits = torch.randn(shape)
    cases = [
        case("some", logits, some, targets),
        case("every", logits, every, targets),
        case("one", logits, one, targets),
        # Differences of thousands: exp overflows without the subtraction of the largest logit.
        case("huge", logits * 1e4, some, targets),
        case("shifted", logits + 1e4, some, targets),
        # Every value is a bfloat16 too, so that a narrow input means the same numbers.
        case("bf16", torch.randn(shape).bfloat16().float(), some, targets),
    ]
    text = ",\n ".join(json.dumps(c) for c in cases)
    Path("sft.json").write_text(f"[{text}]\n")


if __name__ == "__main__":
    main()
