"""unpaired.json: KTO and APO-zero of unpaired labels, and reward models, by the methods of TRL's trainers.

    {batch: {name: rows of tokens}, cases: [{name, kind, options, loss, gradients, metrics}]}
"""

from types import SimpleNamespace

import torch
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from common import logged, mask, near, padded, ragged, trainer, unpadded, write

LENS = [3, 1, 5, 2, 4]
LABELS = [True, False, True, True, False]


def batch():
    torch.manual_seed(17)
    rows = ragged(LENS, 0, -3.0, -0.05)
    mismatched = ragged(LENS, 0, -3.0, -0.05)
    return {
        "policy": rows, "reference": near(rows, 0.3), "entropy": ragged(LENS, 0, 0.1, 2.0),
        "kl_policy": mismatched, "kl_reference": [[x - 0.1 for x in row] for row in near(mismatched, 0.2)],
    }


def kto(batch, name, labels=LABELS, loss="kto", beta=0.3, weights=(1.0, 1.0), far=False):
    rows = batch["policy"]
    leaf = padded(rows).requires_grad_()
    tokens = mask(rows)
    kl = [(padded(batch[name]) * tokens).sum(1) for name in ["kl_policy", "kl_reference"]]
    if far:
        kl.reverse()
    self = trainer(
        precompute_ref_logps=True, calculate_KL=loss == "kto", loss_type=loss, beta=beta,
        desirable_weight=weights[0], undesirable_weight=weights[1], _compute_kl_logps=lambda *_: kl[0] if loss == "kto" else None,
    )
    outputs = SimpleNamespace(
        log_probs=leaf * tokens, entropy=padded(batch["entropy"]), mean_logits=torch.zeros_like(leaf),
    )
    completion = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), tokens], dim=1)
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion,
              "label": torch.tensor(labels), "ref_logps": (padded(batch["reference"]) * tokens).sum(1), "ref_KL_logps": kl[1]}
    loss_value = KTOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)
    loss_value.backward()
    options = {"labels": labels, "loss": loss, "beta": beta, "weights": weights, "swapped": far}
    return {"name": name, "kind": "kto", "options": options, "loss": loss_value.item(),
            "gradients": {"policy": unpadded(leaf.grad, rows)}, "metrics": logged(self)}


def reward(name, margin=None, centering=None):
    torch.manual_seed(18)
    scores = torch.randn(8).float().double().requires_grad_()
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
    inputs = {"attention_mask": torch.ones(8, 3)}
    if margin is not None:
        inputs["margin"] = torch.tensor(margin, dtype=torch.float64)
    model = lambda **_: SimpleNamespace(logits=scores[:, None])
    loss = RewardTrainer.compute_loss(self, model, inputs)
    loss.backward()
    options = {"scores": scores.tolist(), "margin": margin, "centering": centering}
    return {"name": name, "kind": "reward", "options": options, "loss": loss.item(), "gradients": {"scores": [scores.grad.tolist()]},
            "metrics": logged(self)}


def cases(batch):
    yield kto(batch, "kto")
    yield kto(batch, "kto weights", weights=(1.0, 1.4))
    yield kto(batch, "kto below zero", far=True)
    yield kto(batch, "kto desirable only", labels=[True] * 5)
    yield kto(batch, "kto undesirable only", labels=[False] * 5)
    yield kto(batch, "apo", loss="apo_zero_unpaired", weights=(1.2, 1.0))
    yield reward("bradley-terry")
    yield reward("margin", margin=[0.5, 0.0, 1.0, 0.25])
    yield reward("centred", centering=0.25)
    yield reward("margin centred", margin=[0.5, 0.0, 1.0, 0.25], centering=0.25)


def run(versions):
    inputs = batch()
    write("unpaired.json", {"batch": inputs, "cases": list(cases(inputs))}, versions)
