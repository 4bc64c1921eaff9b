"""Makes clip.json: what torch's clip_grad_norm_ does. Run: python tests/golden/optim/generate.py

    [{max_norm (null: infinite), norm, grads, clipped}], each gradient with its shape and values in f32
"""

import json
import math
import pathlib

import torch

SHAPES = [[3, 4], [4, 2], [5]]


def case(scale: float, max_norm: float) -> dict:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape) * scale
    listed = lambda: [{"shape": list(p.shape), "values": p.grad.flatten().tolist()} for p in parameters]
    grads = listed()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    return {
        "max_norm": None if math.isinf(max_norm) else max_norm, "norm": norm, "grads": grads, "clipped": listed(),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [case(*c) for c in [(1.0, 1.0), (30.0, 0.3), (1e-3, 1.0), (1e-7, 1e-7), (1.0, math.inf)]]
    pathlib.Path(__file__).with_name("clip.json").write_text(json.dumps(cases) + "\n")
