"""ppo.json: rewards of tokens, GAE, whitening, and the losses of PPO, by the functions of TRL's last PPO trainers; advantages of groups.

    {batch: {name: rows of tokens}, rewards: [..], gae: [..], cases: [{name, kind, options, loss, gradients, metrics}]}

Both trainers are of older releases that today's transformers does not import, so each function is read out of the source file and run
alone. The advantages of groups stand in the middle of a method in TRL; here they are its formulas in torch.
"""

import ast
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, Mapping, Optional

import numpy as np
import torch
import torch.nn.functional as F

from common import mask, near, padded, ragged, unpadded, write

LENS = [3, 1, 5, 2]


def functions(path, names):
    """The functions and classes of these names in a source file, in a namespace of their own."""
    tree = ast.parse(Path(path).read_text())
    wanted = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names]
    space = {"torch": torch, "F": F, "np": np, "Optional": Optional, "Dict": Dict, "Mapping": Mapping}
    for node in wanted:
        exec(compile(ast.Module([node], []), str(path), "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names}), space


def batch():
    torch.manual_seed(20)
    rows = ragged(LENS, 0, -3.0, -0.05)
    values = ragged(LENS, 1.0)
    shift = lambda rows, scale: [[torch.tensor(x + scale * torch.randn(()).item()).float().item() for x in row] for row in rows]
    return {
        "new": rows, "old": near(rows, 0.3), "reference": near(rows, 0.4), "values": values, "new_values": shift(values, 0.3),
        "token_rewards": ragged(LENS, 1.0),
    }


def run(versions):
    names = ["compute_rewards", "_kl_penalty", "compute_advantages", "loss"]
    old = Path(os.environ["TRL_0_11"]) / "trl"
    trainer, space = functions(old / "trainer/ppo_trainer.py", names)
    core = ["masked_mean", "masked_var", "clip_by_value", "entropy_from_logits", "flatten_dict"]
    space.update(vars(functions(old / "core.py", core)[0]))
    last = functions(Path(os.environ["TRL_1_10"]) / "trl/experimental/ppo/ppo_trainer.py", ["masked_mean", "masked_var", "masked_whiten"])[0]
    space["masked_whiten"] = last.masked_whiten
    control = functions(old / "trainer/utils.py", ["AdaptiveKLController"])[0].AdaptiveKLController

    inputs = batch()
    rows = inputs["new"]
    tokens = mask(rows).double()
    tensor = {name: padded(rows) for name, rows in inputs.items()}
    scores = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)

    rewards = []
    for kind, penalty in {"k1": "kl", "k2": "mse"}.items():
        config = SimpleNamespace(kl_penalty=penalty)
        self = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=0.3))
        self._kl_penalty = lambda *args: trainer._kl_penalty(self, *args)
        got, _, kl = trainer.compute_rewards(self, scores, tensor["old"], tensor["reference"], mask(rows))
        sums = ((tensor["old"] - tensor["reference"]) * tokens).sum(1)
        rewards.append({"name": kind, "coef": 0.3, "scores": scores.tolist(), "rewards": unpadded(got, rows), "kl": sums.tolist()})

    gae = []
    for gamma, lam in [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.95, 0.0)]:
        config = SimpleNamespace(gamma=gamma, lam=lam, whiten_rewards=False)
        _, whitened, returns = trainer.compute_advantages(
            SimpleNamespace(config=config), tensor["values"], tensor["token_rewards"], tokens
        )
        gae.append({"name": f"{gamma} {lam}", "gamma": gamma, "lambda": lam, "whitened": unpadded(whitened, rows),
                    "returns": unpadded(returns, rows)})
    kept = unpadded(last.masked_whiten(tensor["token_rewards"], tokens, shift_mean=False), rows)

    cases = []
    advantages, returns = tensor["token_rewards"], tensor["reference"] * -0.5
    for name, clip, clip_value in [("wide", 0.2, 0.2), ("narrow", 0.1, 0.05)]:
        leaf, values = tensor["new"].clone().requires_grad_(), tensor["new_values"].clone().requires_grad_()
        config = SimpleNamespace(cliprange=clip, cliprange_value=clip_value, vf_coef=0.1, ratio_threshold=10.0)
        policy, value, stats = trainer.loss(
            SimpleNamespace(config=config), tensor["old"], tensor["values"], torch.zeros(len(rows), 5, 3), values, leaf, tokens,
            advantages, returns,
        )
        (policy + value).backward()
        metrics = {k: v.item() for k, v in stats.items() if v.numel() == 1}
        metrics["ratio_mean"] = last.masked_mean(stats["policy/ratio"], tokens).item()
        cases.append({
            "name": name, "kind": "ppo", "options": {"clip": clip, "clip_value": clip_value, "value_coef": 0.1},
            "loss": (policy + value).item(), "policy": policy.item(), "value": value.item(),
            "gradients": {"new": unpadded(leaf.grad, rows), "values": unpadded(values.grad, rows)}, "metrics": metrics,
        })

    adaptive = control(0.2, 6.0, 10000)
    steps = []
    for kl in [[3.0, 4.0], [7.0, 6.5], [20.0, 30.0], [6.0, 6.0]]:
        adaptive.update(sum(kl) / len(kl), len(kl))
        steps.append({"kl": kl, "coef": float(adaptive.value)})

    content = {
        "batch": {**inputs, "returns": unpadded(returns, rows)}, "rewards": rewards, "gae": gae, "whitened_mean_kept": kept,
        "adaptive": steps, "groups": groups(), "cases": cases,
    }
    write("ppo.json", content, versions)


def groups():
    torch.manual_seed(21)
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.25, 1.0, 0.75, 2.0], dtype=torch.float64)
    second = torch.randn(12).float().double()
    size = 4
    grouped = rewards.view(-1, size)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    std = grouped.std(1).repeat_interleave(size)
    others = (grouped.sum(1, keepdim=True) - grouped) / (size - 1)
    columns = torch.stack([rewards, second], 1).view(-1, size, 2)
    normalised = (columns - columns.mean(1, keepdim=True)) / (columns.std(1, keepdim=True) + 1e-4)
    summed = (normalised.view(-1, 2) * torch.tensor([1.0, 0.5])).sum(1)
    return {
        "rewards": rewards.tolist(), "second": second.tolist(), "weights": [1.0, 0.5], "size": size,
        "group": (centred / (std + 1e-4)).tolist(), "batch": (centred / (rewards.std() + 1e-4)).tolist(), "none": centred.tolist(),
        "leave_one_out": (grouped - others).flatten().tolist(),
        "normalized_then_summed": ((summed - summed.mean()) / (summed.std() + 1e-4)).tolist(),
        "std": rewards.std().item(), "mean": rewards.mean().item(),
    }
