"""Log-probabilities of labels, entropies and their gradients, by PyTorch in float64.

python generate.py > log_probs.json
"""

import json

import torch
import transformers
from transformers.trainer_pt_utils import LabelSmoother

torch.manual_seed(11)
torch.set_default_dtype(torch.float64)

ROWS, FEATURES, VOCABULARY = 9, 10, 23


def leaf(*shape, size=1.0):
    return (torch.randn(*shape) * size).round(decimals=6).requires_grad_()


x, weight = leaf(ROWS, FEATURES), leaf(FEATURES, VOCABULARY, size=0.4)
bias = leaf(VOCABULARY, size=0.5)
labels = torch.randint(VOCABULARY, (ROWS,))
cases = []
for temperature in (1.0, 0.7, 1.6):
    operands = [x, weight, bias]
    for operand in operands:
        operand.grad = None
    log_p = torch.log_softmax((x @ weight + bias) / temperature, dim=-1)
    log_prob = log_p.gather(1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    mean = log_p.mean(-1)
    upstream = torch.randn(3, ROWS).round(decimals=6)
    (upstream[0] @ log_prob + upstream[1] @ entropy + upstream[2] @ mean).backward()
    cases.append(
        {
            "temperature": temperature,
            "upstream": upstream.tolist(),
            "log_prob": log_prob.tolist(),
            "entropy": entropy.tolist(),
            "mean": mean.tolist(),
            "log_sum_sq": torch.logsumexp(2 * log_p, -1).tolist(),
            "is_top": (log_p.argmax(-1) == labels).double().tolist(),
            "gradients": [operand.grad.tolist() for operand in operands],
        }
    )


def smoothed(epsilon):
    """The label smoothing of transformers, a mean over the tokens, and the gradient of x."""
    x.grad = None
    loss = LabelSmoother(epsilon=epsilon)({"logits": x @ weight + bias}, labels)
    loss.backward()
    return {"epsilon": epsilon, "loss": loss.item(), "dx": x.grad.tolist()}


def dynamic():
    """Dynamic fine-tuning, equation 7 of its paper, a mean over the tokens, and the gradient of x."""
    x.grad = None
    log_p = torch.log_softmax(x @ weight + bias, dim=-1).gather(1, labels[:, None])[:, 0]
    loss = -(log_p.exp().detach() * log_p).mean()
    loss.backward()
    return {"loss": loss.item(), "dx": x.grad.tolist()}


print(
    json.dumps(
        {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "x": x.tolist(),
            "weight": weight.tolist(),
            "bias": bias.tolist(),
            "labels": labels.tolist(),
            "cases": cases,
            "smoothed": [smoothed(0.1), smoothed(0.3)],
            "dynamic": dynamic(),
        }
    )
)
