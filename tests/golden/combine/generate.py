"""Makes combine.json: adapters that PEFT combines. Run: python tests/golden/combine/generate.py

    adapters    [{name, r, lora_alpha, use_rslora, a, b}]
    weight, x   the layer's weight and inputs
    active      outputs with the adapters `one` and `wide` active at once
    rows, mixed an adapter for each row of the inputs, and the outputs
    cases       [{kind, density, sign, rank, adapters, weights, scale, a, b}]: combinations and what they give; the singular
                vectors of the kinds `svd` have any sign, so that of these only the product means something

One linear layer [d_out, d_in] without a bias; matrices are nested lists in f32, in PyTorch's layout. DARE is random but where
its density is 1: only that case is here.
"""

import json
import pathlib

import peft
import torch
from peft import LoraConfig, get_peft_model

D_IN, D_OUT, ROWS = 6, 5, 4
ADAPTERS = [("one", 3, 6, False), ("two", 3, 2, True), ("three", 3, 3, False), ("wide", 5, 4, False)]
SAME = ["one", "two", "three"]
CASES = [
    # kind, density, sign, adapters, weights, svd_rank
    ("cat", None, None, ["one", "wide"], [0.7, -1.3], None),
    ("linear", None, None, SAME, [0.7, -1.3, 0.4], None),
    # Not `two` first: the result would inherit rsLoRA, and with it a scale of √r that makes it another sum.
    ("linear", None, None, ["three", "two"], [0.5, 1.0], None),
    ("ties", 0.5, "total", SAME, [0.7, -1.3, 0.4], None),
    ("ties", 0.3, "frequency", SAME, [1.0, 2.0, 0.4], None),
    ("ties", 1.0, "frequency", ["one", "two"], [1.0, 1.0], None),
    ("magnitude_prune", 0.4, None, SAME, [0.7, -1.3, 0.4], None),
    ("dare_linear", 1.0, None, SAME, [0.7, -1.3, 0.4], None),
    ("dare_ties", 1.0, "total", SAME, [0.7, 1.3, 0.4], None),
    ("svd", None, None, ["one", "wide"], [0.7, -1.3], None),
    ("svd", None, None, SAME, [0.7, -1.3, 0.4], 2),
    ("svd", None, None, ["wide", "one", "three"], [1.0, 0.5, 2.0], 4),
    ("ties_svd", 0.5, "total", ["one", "wide", "two"], [0.7, 1.3, 0.4], 4),
    ("ties_svd", 0.3, "frequency", SAME, [1.0, 2.0, 0.4], 5),
    ("magnitude_prune_svd", 0.4, None, ["wide", "two"], [0.7, -1.3], 3),
    ("dare_linear_svd", 1.0, None, SAME, [0.7, -1.3, 0.4], 3),
    ("dare_ties_svd", 1.0, "total", ["three", "wide"], [0.7, 1.3], None),
]


def main() -> None:
    torch.manual_seed(0)
    model = None
    net = torch.nn.Sequential(torch.nn.Linear(D_IN, D_OUT, bias=False))
    for name, r, alpha, rslora in ADAPTERS:
        config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
        if model is None:
            model = get_peft_model(net, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.5)
    layer = model.base_model.model[0]
    factors = lambda name: {
        "a": layer.lora_A[name].weight.tolist(), "b": layer.lora_B[name].weight.tolist(),
    }
    x = torch.randn(ROWS, D_IN)
    model.eval()
    with torch.no_grad():
        model.base_model.set_adapter(["one", "wide"])
        active = model(x)
        rows = ["two", "__base__", "wide", "two"]
        mixed = model(x, adapter_names=rows)
    cases = []
    for place, (kind, density, sign, adapters, weights, rank) in enumerate(CASES):
        model.add_weighted_adapter(
            adapters, weights, f"case{place}", combination_type=kind, density=density,
            majority_sign_method=sign or "total", svd_rank=rank,
        )
        cases.append({
            "kind": kind, "density": density, "sign": sign, "rank": rank, "adapters": adapters, "weights": weights,
            "scale": layer.scaling[f"case{place}"], **factors(f"case{place}"),
        })
    out = {
        "peft": peft.__version__,
        "adapters": [
            {"name": name, "r": r, "lora_alpha": alpha, "use_rslora": rslora, **factors(name)}
            for name, r, alpha, rslora in ADAPTERS
        ],
        "weight": layer.base_layer.weight.tolist(), "x": x.tolist(), "active": active.tolist(),
        "rows": rows, "mixed": mixed.tolist(), "cases": cases,
    }
    pathlib.Path(__file__).with_name("combine.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
