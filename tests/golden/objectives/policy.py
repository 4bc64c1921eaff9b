"""policy.json: the family of GRPO, and RLOO, by the methods of TRL's trainers; the advantages of groups as well.

    {batch: {name: rows of tokens}, cases: [{name, kind, options, loss, gradients, metrics}]}

`weights` of the batch are those of the correction between sampling and training.
"""

from types import SimpleNamespace

import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from common import logged, mask, near, padded, ragged, trainer, unpadded, write

LENS = [3, 1, 5, 2, 4, 4]
ADVANTAGES = [0.75, -1.25, 0.5, -0.375, 1.5, -2.0]
MAX_LENGTH = 7


def number(x):
    """As a tensor, or torch.where would round it to f32."""
    return torch.tensor(x, dtype=torch.float64)


def batch():
    torch.manual_seed(19)
    rows = ragged(LENS, 0, -3.0, -0.05)
    return {
        "new": rows, "old": near(rows, 0.4), "reference": near(rows, 0.5), "entropy": ragged(LENS, 0, 0.1, 2.0),
        "weights": ragged(LENS, 0, 0.5, 2.0),
    }


def grpo(batch, name, loss="grpo", level="token", beta=0.0, corrected=True, epsilon=(0.2, 0.2), delta=None, entropy=0.0,
         weights=False, on_policy=False, threshold=None):
    rows = batch["new"]
    leaf = padded(rows).requires_grad_()
    entropies = padded(batch["entropy"]).requires_grad_()
    tokens = mask(rows)
    self = trainer(
        args=SimpleNamespace(use_bias_correction_kl=corrected, delta=delta, sapo_temperature_pos=number(1.0), sapo_temperature_neg=number(1.05),
                             vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, steps_per_generation=1),
        loss_type=loss, importance_sampling_level=level, beta=beta, epsilon_low=epsilon[0], epsilon_high=epsilon[1],
        top_entropy_quantile=1.0, off_policy_mask_threshold=threshold, use_vllm=weights, vllm_importance_sampling_correction=weights,
        _entropy_bonus_enabled=entropy > 0, use_adaptive_entropy=False, entropy_coef=entropy, max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1, get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, entropies, None),
    )
    inputs = {
        "prompt_ids": tokens[:, :1], "prompt_mask": tokens[:, :1], "completion_ids": tokens, "completion_mask": tokens,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64), "num_items_in_batch": tokens.sum(),
        "old_per_token_logps": None if on_policy else padded(batch["old"]), "ref_per_token_logps": padded(batch["reference"]),
        "importance_sampling_ratio": padded(batch["weights"], fill=1.0) if weights else None,
    }
    value = GRPOTrainer._compute_loss(self, None, inputs)
    value.backward()
    gradients = {"new": unpadded(leaf.grad, rows)}
    if entropy:
        gradients["entropy"] = unpadded(entropies.grad, rows)
    options = {"loss": loss, "level": level, "beta": beta, "corrected": corrected, "epsilon": epsilon, "delta": delta,
               "entropy": entropy, "weights": weights, "on_policy": on_policy, "advantages": ADVANTAGES, "max_length": MAX_LENGTH,
               "threshold": threshold}
    return {"name": name, "kind": "grpo", "options": options, "loss": value.item(), "gradients": gradients, "metrics": logged(self)}


def rloo(batch, name):
    rows = batch["new"]
    leaf = padded(rows).requires_grad_()
    tokens = mask(rows)
    self = trainer(
        epsilon_low=0.2, epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, padded(batch["entropy"]), None),
    )
    inputs = {
        "prompt_ids": tokens[:, :1], "prompt_mask": tokens[:, :1], "completion_ids": tokens, "completion_mask": tokens,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64), "old_logps": (padded(batch["old"]) * tokens).sum(1),
    }
    value = RLOOTrainer._compute_loss(self, None, inputs)
    value.backward()
    options = {"loss": "rloo", "level": "sequence_sum", "beta": 0.0, "corrected": True, "epsilon": [0.2, 0.2], "delta": None,
               "entropy": 0.0, "weights": False, "on_policy": False, "advantages": ADVANTAGES, "max_length": MAX_LENGTH,
               "threshold": None}
    return {"name": name, "kind": "grpo", "options": options, "loss": value.item(), "gradients": {"new": unpadded(leaf.grad, rows)},
            "metrics": logged(self)}


def cases(batch):
    every = ["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"]
    for loss in every:
        epsilon = (0.2, 1.1) if loss == "cispo" else (0.2, 0.28)
        yield grpo(batch, loss, loss, epsilon=epsilon)
        yield grpo(batch, f"{loss} sequence", loss, level="sequence", epsilon=epsilon)
        yield grpo(batch, f"{loss} on-policy", loss, epsilon=epsilon, on_policy=True)
        yield grpo(batch, f"{loss} all", loss, epsilon=epsilon, beta=0.2, entropy=0.05, weights=True)
    yield grpo(batch, "kl", beta=0.3)
    yield grpo(batch, "kl uncorrected", beta=0.3, corrected=False)
    yield grpo(batch, "kl sequence", beta=0.3, level="sequence")
    yield grpo(batch, "dual clip", "dapo", delta=1.3)
    yield grpo(batch, "entropy", "dapo", entropy=0.1)
    yield grpo(batch, "off-policy", "dapo", threshold=0.02)
    yield rloo(batch, "rloo")


def run(versions):
    inputs = batch()
    write("policy.json", {"batch": inputs, "cases": list(cases(inputs))}, versions)
