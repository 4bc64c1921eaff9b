"""Log-probabilities of labels, entropies and their gradients, by PyTorch in float64.

python generate.py > log_probs.json
"""

import json

import torch

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
print(
    json.dumps(
        {
            "torch": torch.__version__,
            "x": x.tolist(),
            "weight": weight.tolist(),
            "bias": bias.tolist(),
            "labels": labels.tolist(),
            "cases": cases,
        }
    )
)
