"""A small model with one layer of every kind that an adapter of PEFT can change.

Tokens t [batch, 7] of a vocabulary of 11; all layers in torch's layout; E = 4 experts:

    e = embed[t]                                         [batch, 7, 8]
    c = tanh(conv1(eᵀ))                                  [batch, 12, 7]    kernel 3, padding 1
    g = tanh(grouped(c))                                 [batch, 12, 7]    kernel 3, padding 1, 3 groups
    h = norm(up(gᵀ))                                     [batch, 7, 16]    LayerNorm, ε = 1e-5
    m = h + 1/E · Σ_e tanh(gate_e · h) ⊙ (weight_e · h)  [batch, 7, 16]
    z = tanh(conv2(m as [batch, 1, 7, 16]))              [batch, 6, 4, 15] kernel (3, 2), stride (2, 1), padding (1, 0)
    y = head(z flattened to [batch, 360])                [batch, 5]

All layers but `embed` and `experts` have a bias. `experts.weight` and `experts.gate`, registered in this order, are [E, out, in];
in the transposed variant, which has the same outputs, they are [E, in, out], and `experts.is_transposed` tells PEFT so.
"""

import pathlib

import torch
from safetensors.torch import load_file
from torch import nn

HERE = pathlib.Path(__file__).parent


class Experts(nn.Module):
    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.empty(4, 16, 16))
        self.gate = nn.Parameter(torch.empty(4, 16, 16))

    def product(self, x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bti,eio->bteo" if self.is_transposed else "bti,eoi->bteo", x, parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (torch.tanh(self.product(x, self.gate)) * self.product(x, self.weight)).mean(2)


class Kinds(nn.Module):
    def __init__(self, transposed: bool = False):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.up = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.experts = Experts(transposed)
        # PEFT's factor A has no dilation, so a dilated convolution fails in its forward.
        self.conv2 = nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.head = nn.Linear(360, 5)

    def get_input_embeddings(self) -> nn.Embedding:
        """Where PEFT looks for the embedding when `trainable_token_indices` is a list."""
        return self.embed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv1(self.embed(tokens).transpose(1, 2)))
        x = torch.tanh(self.grouped(x)).transpose(1, 2)
        x = self.experts(self.norm(self.up(x)))
        return self.head(torch.tanh(self.conv2(x.unsqueeze(1))).flatten(1))


def load(transposed: bool = False) -> Kinds:
    """The model with the weights of `base.safetensors`, whose experts are [E, out, in]."""
    weights = load_file(HERE / "base.safetensors")
    if transposed:
        for name in ("experts.weight", "experts.gate"):
            weights[name] = weights[name].transpose(1, 2).contiguous()
    model = Kinds(transposed)
    model.load_state_dict(weights)
    return model.eval()
