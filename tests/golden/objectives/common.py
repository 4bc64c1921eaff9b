"""What the scripts share: ragged batches, and stand-ins for the parts of a trainer that a loss reads."""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).parent


def ragged(lens, scale, low=None, high=None):
    """Rows of random f32 numbers (as f64): a test in f32 reads the same ones."""
    rows = [(torch.randn(n) * scale).float() for n in lens]
    if low is not None:
        rows = [torch.empty(n).uniform_(low, high).float() for n in lens]
    return [row.double().tolist() for row in rows]


def near(rows, scale):
    """The rows with small random changes, in f32; at most -2^-10, as log-probabilities are."""
    return [[min(torch.tensor(x + scale * torch.randn(()).item()).float().item(), -(2.0**-10)) for x in row] for row in rows]


def padded(rows, dtype=torch.float64, fill=0.0):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def mask(rows):
    return padded([[1] * len(row) for row in rows], torch.long, 0)


def unpadded(tensor, rows):
    return [values[: len(row)] for values, row in zip(tensor.tolist(), rows)]


def accelerator():
    same = lambda x, *args, **kwargs: x
    return SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, num_processes=1,
        pad_across_processes=same, sync_gradients=False, is_main_process=True, process_index=0,
    )


def trainer(**fields):
    """What a method of a trainer reads of its object."""
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False
    base = dict(
        model=model, accelerator=accelerator(), aux_loss_enabled=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )
    return SimpleNamespace(**{**base, **fields})


def logged(self):
    return {name: values[-1] for name, values in self._metrics["train"].items()}


def write(name, content, versions):
    text = {"versions": versions, **content}
    body = json.dumps(text, indent=None, separators=(",", ":"))
    # A case on a line of its own.
    body = body.replace('{"name":', '\n{"name":')
    (HERE / name).write_text(body + "\n")
    print(name, len(content["cases"]), "cases", len(body), "bytes")
