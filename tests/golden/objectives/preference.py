"""preference.json: DPO, CPO, SimPO and ORPO, by the methods of TRL's trainers.

    {batch: {name: rows of tokens}, cases: [{name, kind, options, dtype, loss, gradients: {chosen, rejected}, metrics}]}

The same batch for all cases. Losses and gradients are of f64, but where TRL itself computes in f32 (`dtype`).
"""

from types import SimpleNamespace

import numpy as np
import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

from common import accelerator, logged, mask, near, padded, ragged, trainer, unpadded, write

LENS = [[3, 1, 5, 2], [2, 4, 5, 1]]


def batch():
    torch.manual_seed(16)
    sides = {}
    for side, lens in zip(["chosen", "rejected"], LENS):
        rows = ragged(lens, 0, -3.0, -0.05)
        sides[side] = rows
        sides[f"reference_{side}"] = near(rows, 0.3)
        sides[f"entropy_{side}"] = ragged(lens, 0, 0.1, 2.0)
        sides[f"log_sum_sq_{side}"] = ragged(lens, 0, -2.0, -0.05)
        sides[f"top1_{side}"] = [[float(x > -1.5) for x in row] for row in rows]
    return sides


def both(batch, name, dtype):
    return padded(batch[f"{name}_chosen".lstrip("_")] + batch[f"{name}_rejected".lstrip("_")], dtype)


def dpo(batch, name, losses, beta=0.1, smoothing=0.0, divergence="reverse_kl", alpha=0.5, ld_alpha=None, weighting=False, dtype=torch.float64, tau=0.05):
    rows = batch["chosen"] + batch["rejected"]
    leaf = both(batch, "", dtype).requires_grad_()
    tokens = mask(rows)
    self = trainer(
        ld_alpha=ld_alpha, precompute_ref_logps=False, f_divergence_type=divergence, f_alpha_divergence_coef=alpha,
        loss_types=[loss for loss, _ in losses], loss_weights=[weight for _, weight in losses], beta=beta,
        # As a number of numpy, or EXO would take its logarithm in f32.
        label_smoothing=np.float64(smoothing), use_weighting=weighting,
        args=SimpleNamespace(discopop_tau=tau, gradient_checkpointing_kwargs=None),
    )
    reference = both(batch, "reference", dtype) * tokens
    self.ref_model = lambda **_: SimpleNamespace(log_probs=reference)
    outputs = SimpleNamespace(
        log_probs=leaf * tokens, entropy=both(batch, "entropy", dtype), mean_logits=torch.zeros_like(leaf),
        is_top1=both(batch, "top1", dtype).bool(), log_sum_sq_probs=both(batch, "log_sum_sq", dtype),
    )
    completion = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), tokens], dim=1)
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion}
    loss = DPOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)
    loss.backward()
    gradient = unpadded(leaf.grad, rows)
    pairs = len(batch["chosen"])
    options = {"losses": losses, "beta": beta, "smoothing": smoothing, "divergence": divergence, "alpha": alpha,
               "ld_alpha": ld_alpha, "weighting": weighting, "tau": tau}
    return {"name": name, "kind": "dpo", "options": options, "dtype": str(dtype)[6:], "loss": loss.item(),
            "gradients": {"chosen": gradient[:pairs], "rejected": gradient[pairs:]}, "metrics": logged(self)}


def without_reference(batch, name, kind, options, dtype=torch.float64):
    leaves = [padded(batch[side], dtype).requires_grad_() for side in ["chosen", "rejected"]]
    masks = [mask(batch[side]) for side in ["chosen", "rejected"]]
    sums = [(leaf * tokens).sum(1) for leaf, tokens in zip(leaves, masks)]
    means = [x / tokens.sum(1) for x, tokens in zip(sums, masks)]
    nll = -(leaves[0] * masks[0]).sum() / masks[0].sum()
    if kind == "cpo":
        average = options["loss"] in ["ipo", "simpo"]
        read = means if average else sums
        self = SimpleNamespace(
            accelerator=accelerator(), beta=options["beta"], loss_type=options["loss"], label_smoothing=options["smoothing"],
            simpo_gamma=options["margin"], alpha=options["alpha"], cpo_alpha=options["nll_weight"], aux_loss_enabled=False,
            concatenated_forward=lambda *_: (*read, *read, nll),
        )
        self.cpo_loss = lambda *args: CPOTrainer.cpo_loss(self, *args)
        loss, metrics = CPOTrainer.get_batch_loss_metrics(self, None, None)
    else:
        self = SimpleNamespace(
            accelerator=accelerator(), beta=options["beta"], aux_loss_enabled=False,
            concatenated_forward=lambda *_: (*means, *means, nll),
        )
        self.odds_ratio_loss = lambda *args: ORPOTrainer.odds_ratio_loss(self, *args)
        loss, metrics = ORPOTrainer.get_batch_loss_metrics(self, None, None)
    loss.backward()
    gradients = {side: unpadded(leaf.grad, batch[side]) for side, leaf in zip(["chosen", "rejected"], leaves)}
    return {"name": name, "kind": kind, "options": options, "dtype": str(dtype)[6:], "loss": loss.item(), "gradients": gradients,
            "metrics": metrics}


def cases(batch):
    smoothed = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
    every = ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
             "apo_down", "aot", "aot_unpaired", "discopop", "sft"]
    for loss in every:
        yield dpo(batch, loss, [(loss, 1.0)], beta=0.3, smoothing=smoothed.get(loss, 0.0))
    yield dpo(batch, "weighted", [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)])
    for divergence in ["forward_kl", "js_divergence"]:
        for loss in ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]:
            yield dpo(batch, f"{divergence} {loss}", [(loss, 1.0)], smoothing=smoothed.get(loss, 0.0), divergence=divergence)
    for alpha in [0.5, 2.0]:
        yield dpo(batch, f"alpha {alpha}", [("sigmoid", 1.0)], divergence="alpha_divergence", alpha=alpha, dtype=torch.float32)
    yield dpo(batch, "alpha 1", [("sigmoid", 1.0)], divergence="alpha_divergence", alpha=1.0)
    for loss in ["sigmoid", "ipo", "aot", "apo_zero"]:
        yield dpo(batch, f"ld {loss}", [(loss, 1.0)], smoothing=smoothed.get(loss, 0.0), ld_alpha=0.3)
    yield dpo(batch, "wpo", [("sigmoid", 1.0)], weighting=True)
    yield dpo(batch, "wpo aot", [("aot", 1.0)], weighting=True)

    base = {"beta": 0.3, "loss": "sigmoid", "smoothing": 0.0, "margin": 0.5, "alpha": 0.0, "nll_weight": 1.0}
    for name, options in {
        "cpo": {}, "cpo smoothed": {"smoothing": 0.1}, "cpo hinge": {"loss": "hinge"}, "cpo ipo": {"loss": "ipo"},
        "simpo": {"loss": "simpo", "beta": 2.0, "nll_weight": 0.0}, "cpo-simpo": {"loss": "simpo", "beta": 2.0, "nll_weight": 0.5},
        "alphapo": {"loss": "simpo", "beta": 2.0, "nll_weight": 0.0, "alpha": 0.25},
    }.items():
        yield without_reference(batch, name, "cpo", {**base, **options})
    # TRL rounds to f32 in between.
    yield without_reference(batch, "orpo", "orpo", {"beta": 0.1}, torch.float32)
    sure = {**batch, "chosen": [[x / 30 for x in row] for row in batch["chosen"]]}
    sure = {name: [[torch.tensor(x).float().item() for x in row] for row in rows] for name, rows in sure.items()}
    case = without_reference(sure, "orpo sure", "orpo", {"beta": 0.1}, torch.float32)
    yield {**case, "chosen": sure["chosen"]}


def run(versions):
    inputs = batch()
    write("preference.json", {"batch": inputs, "cases": list(cases(inputs))}, versions)
