"""Everything that is timed on the peers' side: a case becomes a function that runs it once.

Each peer in its best setting: torch's dense product in both orientations of the weight; bitsandbytes' training path,
and its inference path, which repacks the weight once and computes in bf16; PEFT's layers called directly, without the
wrapper of the model, and AdamW fused. Factors of adapters are f32, PEFT's default and ours.
"""

import ctypes
import itertools
from dataclasses import dataclass, replace

import bitsandbytes as bnb
import peft
import torch
from bitsandbytes.cextension import lib
from torch.nn import functional

from train_step import train_step

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 64
# As in subject.rs: up to FEW rows go through several weights in turn, IN_TURN bytes of them, as in a model.
FEW = 8
IN_TURN = 128 << 20


@dataclass(frozen=True)
class Case:
    """A case by its name, `subject/dtype/d_in x d_out/tokens/rank`; see case.rs."""

    subject: str
    dtype: torch.dtype
    d_in: int
    d_out: int
    tokens: int
    rank: int

    @classmethod
    def parse(cls, name):
        subject, dtype, dims, tokens, rank = name.split("/")
        d_in, d_out = map(int, dims.split("x"))
        return cls(subject, DTYPES[dtype], d_in, d_out, int(tokens), int(rank))

    def small(self):
        """A small case of the same kind, if there is one."""
        if self.subject.startswith("step-"):
            return None
        return replace(self, d_in=256, d_out=256, tokens=16)


def build(case):
    """Makes everything a case needs, and returns what runs it once."""
    return SUBJECTS[case.subject](case)


def weight(case, dtype=None):
    """A dense weight [d_out, d_in], torch's layout, of the scale that trained models have."""
    return (0.02 * torch.randn(case.d_out, case.d_in)).to(dtype or case.dtype)


def activations(case, width=None, requires_grad=False):
    x = torch.randn(case.tokens, width or case.d_in).to(case.dtype)
    return x.requires_grad_(requires_grad)


def copies(case, make, size):
    """As many weights as are taken in turn, each of `size` bytes."""
    count = -(-IN_TURN // size) if case.tokens <= FEW else 1
    return [make() for _ in range(count)]


def torch_dense(case):
    size = case.d_in * case.d_out * case.dtype.itemsize
    weights = itertools.cycle(copies(case, lambda: weight(case), size))
    x = activations(case)
    return lambda: functional.linear(x, next(weights))


def torch_dense_in_out(case):
    """The other orientation: the weight as [d_in, d_out]."""
    size = case.d_in * case.d_out * case.dtype.itemsize
    weights = itertools.cycle(copies(case, lambda: weight(case).t().contiguous(), size))
    x = activations(case)
    return lambda: x @ next(weights)


def quantize(case):
    dense = weight(case, torch.float32)
    return lambda: bnb.functional.quantize_4bit(dense, blocksize=BLOCK, quant_type="nf4")


def dequantize(case):
    """Into a fresh buffer at each call."""
    packed, state = bnb.functional.quantize_4bit(weight(case), blocksize=BLOCK, quant_type="nf4")
    return lambda: bnb.functional.dequantize_4bit(packed, state)


def dequantize_reused(case):
    """Into one buffer: bitsandbytes' kernel called directly, as its operator has no such form on a CPU."""
    packed, state = bnb.functional.quantize_4bit(weight(case), blocksize=BLOCK, quant_type="nf4")
    out = torch.empty(case.d_out, case.d_in, dtype=case.dtype)
    kernels = {
        torch.float32: lib.cdequantize_blockwise_cpu_nf4_fp32,
        torch.bfloat16: lib.cdequantize_blockwise_cpu_nf4_bf16,
    }
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, state.absmax, out)]
    sizes = [ctypes.c_longlong(n) for n in (BLOCK, case.d_out, case.d_in)]

    def run(kept=(packed, state, out)):  # The tensors live as long as what points to them.
        kernels[case.dtype](*pointers, *sizes)

    expected = bnb.functional.dequantize_4bit(packed, state)
    run()
    assert torch.equal(out, expected), "the direct call of bitsandbytes' kernel is wrong"
    return run


def linear_4bit(case):
    """A layer of bitsandbytes, packed."""
    layer = bnb.nn.Linear4bit(
        case.d_in, case.d_out, bias=False, compute_dtype=case.dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight(case), requires_grad=False, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return layer.to("cpu")


def bnb_training(case):
    layers = copies(case, lambda: linear_4bit(case).train(), case.d_in * case.d_out // 2)
    turn = itertools.cycle(layers)
    x = activations(case, requires_grad=True)
    return lambda: next(turn)(x)


@torch.no_grad()
def bnb_inference(case):
    layers = copies(case, lambda: linear_4bit(case).eval(), case.d_in * case.d_out // 2)
    turn = itertools.cycle(layers)
    x = activations(case)
    # The first call of each layer repacks its weight.
    for layer in layers:
        layer(x)

    @torch.no_grad()
    def run():
        next(turn)(x)

    return run


class OneLayer(torch.nn.Module):
    def __init__(self, layer, in_4bit):
        super().__init__()
        self.layer = layer
        # By this PEFT recognises a model of bitsandbytes.
        self.is_loaded_in_4bit = in_4bit

    def forward(self, x):
        return self.layer(x)


def peft_layer(case, layer, in_4bit, dora):
    """Forward and backward as in the middle of a model: gradients of the factors and of the input."""
    config = peft.LoraConfig(r=case.rank, lora_alpha=case.rank, use_dora=dora, target_modules=["layer"])
    model = peft.get_peft_model(OneLayer(layer, in_4bit), config)
    layer = model.base_model.model.layer
    assert ("4bit" in type(layer).__name__) == in_4bit, type(layer)
    x = activations(case, requires_grad=True)
    ones = torch.ones(case.tokens, case.d_out, dtype=case.dtype)

    def run():
        layer(x).backward(ones)
        for tensor in (x, *layer.parameters()):
            tensor.grad = None

    return run


def peft_lora(case, dora=False):
    layer = torch.nn.Linear(case.d_in, case.d_out, bias=False, dtype=case.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight(case))
    return peft_layer(case, layer, in_4bit=False, dora=dora)


def peft_qlora(case, dora=False):
    return peft_layer(case, linear_4bit(case), in_4bit=True, dora=dora)


SUBJECTS = {
    "torch-dense": torch_dense,
    "torch-dense-in-out": torch_dense_in_out,
    "bnb-quantize": quantize,
    "bnb-dequantize": dequantize,
    "bnb-dequantize-reused": dequantize_reused,
    "bnb-training": bnb_training,
    "bnb-inference": bnb_inference,
    "peft-lora": peft_lora,
    "peft-qlora": peft_qlora,
    "peft-dora": lambda case: peft_lora(case, dora=True),
    "peft-qdora": lambda case: peft_qlora(case, dora=True),
    "step-peft-lora": lambda case: train_step(False, case.dtype),
    "step-peft-qlora": lambda case: train_step(True, case.dtype),
}
