"""Makes adamw_8bit.json: steps of bitsandbytes' AdamW8bit on a CPU. Run: python tests/golden/optim/adamw_8bit.py

    {signed, unsigned: the maps of 256 values,
     runs: [{name, lr, betas, eps, weight_decay, bf16, plain,
             before: values, steps: [{grad, after: values, codes, absmax of both moments after the step}]}]}

Every number is f32, or bf16 as f32. With `plain` the moments are quantised by bitsandbytes' implementation in torch, which takes
the nearest value of the map; else by its library for CPUs, which takes one nearby. A run of few values is in 32 bits: its moments
are `moments`.
"""

import json
import pathlib

import bitsandbytes as bnb
import bitsandbytes.backends.cpu.ops as cpu
import bitsandbytes.functional as F
import torch

VALUES = 320  # A block and a part of one.
STEPS = 5
LIBRARY = cpu._quant_blockwise_fp32_direct


def plain(values, code, absmax_out, codes_out, blocksize):
    """What bitsandbytes registers as the default of quantize_blockwise: bounds halfway between values, the lower on a tie."""
    bounds = (code[:-1] + code[1:]) / 2
    for index, block in enumerate(values.split(blocksize)):
        absmax = block.abs().max()
        scaled = block / absmax.clamp(min=1e-38)
        absmax_out[index] = absmax
        codes_out[index * blocksize : index * blocksize + len(block)] = torch.bucketize(scaled, bounds).to(torch.uint8)


def listed(tensor):
    return tensor.detach().float().flatten().tolist()


def run(name, lr, betas, eps, weight_decay, bf16, nearest, min_8bit_size=0):
    cpu._quant_blockwise_fp32_direct = plain if nearest else LIBRARY
    dtype = torch.bfloat16 if bf16 else torch.float32
    parameter = torch.nn.Parameter(torch.randn(VALUES).to(dtype))
    optimizer = bnb.optim.AdamW8bit(
        [parameter], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, min_8bit_size=min_8bit_size
    )
    # Of magnitudes over three decades, and a block that has no gradient at first.
    scale = 10.0 ** -(3 * torch.rand(VALUES))
    before = listed(parameter)
    steps = []
    for step in range(STEPS):
        grad = torch.randn(VALUES) * scale
        if step < 2:
            grad[256:] = 0.0
        parameter.grad = grad.to(dtype)
        entry = {"grad": listed(parameter.grad)}
        optimizer.step()
        state = optimizer.state[parameter]
        entry["after"] = listed(parameter)
        if min_8bit_size:
            entry["moments"] = [listed(state["state1"]), listed(state["state2"])]
        else:
            entry["codes"] = [state["state1"].tolist(), state["state2"].tolist()]
            entry["absmax"] = [listed(state["absmax1"]), listed(state["absmax2"])]
        steps.append(entry)
    return {
        "name": name, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bf16": bf16, "plain": nearest,
        "min_8bit_size": min_8bit_size, "before": before, "steps": steps,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    runs = [
        run("defaults", 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, True),
        run("library", 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, False),
        run("others", 3e-2, (0.8, 0.95), 1e-4, 0.0, False, True),
        run("bf16", 2e-3, (0.9, 0.99), 1e-8, 0.1, True, True),
        run("32 bits", 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, True, min_8bit_size=VALUES + 1),
    ]
    maps = {name: listed(F.create_dynamic_map(signed=name == "signed")) for name in ["signed", "unsigned"]}
    # Nine digits tell every f32.
    shorten = lambda value: json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.9g}"))
    path = pathlib.Path(__file__).with_name("adamw_8bit.json")
    path.write_text(json.dumps(shorten({**maps, "runs": runs}), separators=(",", ":")) + "\n")
