"""Makes lora_fa.json: steps of PEFT's LoRA-FA optimiser. Run: python tests/golden/optim/lora_fa.py

    [{rank, alpha, rslora, lr, weight_decay, eps, weights, a, x, target, b}]: two linear layers without bias, `tanh` between
    them; `a` the factors A of both, the B are zero at first; `b[t]` the factors B of both after step t. The loss is the sum of
    squared errors. Matrices are nested lists in f32, in PyTorch's layout.

PEFT computes the projection in bf16 where bf16 is available, which is nothing to compare with: it is told that it is not. Its
ε is not corrected for the bias, so one case has the default and the others one that does not count.
"""

import json
import pathlib

import peft
import torch
from peft.optimizers import lorafa

D_IN, HIDDEN, D_OUT, ROWS, STEPS = 6, 5, 4, 12, 6
CASES = [
    # rank, alpha, rslora, lr, weight_decay, eps
    (2, 6, False, 0.01, 0.0, 1e-12),
    (3, 6, True, 0.01, 0.0, 1e-12),
    (2, 2, False, 0.001, 0.5, 1e-12),
    (2, 6, False, 0.01, 0.0, 1e-6),
]


def case(rank: int, alpha: int, rslora: bool, lr: float, decay: float, eps: float) -> dict:
    net = torch.nn.Sequential(
        torch.nn.Linear(D_IN, HIDDEN, bias=False), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, D_OUT, bias=False),
    )
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["0", "2"])
    model = peft.get_peft_model(net, config)
    layers = [model.base_model.model[place] for place in (0, 2)]
    optimizer = lorafa.create_lorafa_optimizer(
        model, r=rank, lora_alpha=alpha, lr=lr, weight_decay=decay, use_rslora=rslora,
    )
    optimizer.param_groups[0]["eps"] = eps
    x, target = torch.randn(ROWS, D_IN), 3.0 * torch.randn(ROWS, D_OUT)
    factors = lambda side: [getattr(layer, side)["default"].weight.tolist() for layer in layers]
    a, steps = factors("lora_A"), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        optimizer.step()
        steps.append(factors("lora_B"))
    assert factors("lora_A") == a
    return {
        "rank": rank, "alpha": alpha, "rslora": rslora, "lr": lr, "weight_decay": decay, "eps": eps,
        "weights": [layer.base_layer.weight.tolist() for layer in layers], "a": a,
        "x": x.tolist(), "target": target.tolist(), "b": steps,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    lorafa.is_bf16_available = lambda: False
    cases = [case(*c) for c in CASES]
    pathlib.Path(__file__).with_name("lora_fa.json").write_text(json.dumps(cases) + "\n")
