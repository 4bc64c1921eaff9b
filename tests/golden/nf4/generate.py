"""Makes the golden data of tests/nf4.rs from bitsandbytes 0.50.2 on a CPU.

    pip install torch numpy safetensors bitsandbytes==0.50.2
    OMP_NUM_THREADS=1 python generate.py

Tensors of quantize.safetensors and shapes.safetensors, for a matrix NAME [d_out, d_in] and a block size BS:
    NAME.input                the matrix, in f32, bf16 or f16
    NAME.BS.packed            codes, U8 [ceil(n/2)]
    NAME.BS.absmax            scales, F32 [blocks]
    NAME.BS.f32, .bf16, .f16  what bitsandbytes restores, [n], where stored
    NAME.BS.spec              what the specification restores, F32 [n], where bitsandbytes is wrong
Tensors of double.safetensors: the same with absmax in U8, and
    NAME.BS.nested_absmax     F32 [ceil(blocks/256)]
    NAME.BS.nested_offset     F32 [1]
    NAME.BS.restored          the scales, restored by bitsandbytes, F32 [blocks]
    SCALES.scales, .codes     scales and bitsandbytes' nested codes of them, without a matrix
    dynamic_map               F32 [256]
"""

from pathlib import Path

import bitsandbytes.functional as F
import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CODEBOOK = F.get_4bit_type("nf4", device="cpu")
THRESHOLDS = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2

assert torch.get_num_threads() == 1, "set OMP_NUM_THREADS=1: torch's mean depends on the number of threads"
rng = np.random.default_rng(20240523)


def normal(*shape):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def same(a, b):
    """Equal to the bit, the signs of zeros included; there are no NaNs."""
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def by_the_spec(packed, absmax, n, block_size):
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n].long()
    return CODEBOOK[codes] * absmax.repeat_interleave(block_size)[:n]


def quantize(tensors, name, x, block_size, outputs=(), bnb_is_wrong=False, double=False):
    key = f"{name}.{block_size}"
    packed, state = F.quantize_4bit(x, blocksize=block_size, quant_type="nf4", compress_statistics=double)
    packed = packed.flatten()
    tensors[f"{name}.input"] = x
    tensors[f"{key}.packed"] = packed
    tensors[f"{key}.absmax"] = absmax = state.absmax
    if double:
        assert state.state2.blocksize == 256
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
        tensors[f"{key}.nested_absmax"] = state.state2.absmax
        tensors[f"{key}.nested_offset"] = state.offset.reshape(1)
        tensors[f"{key}.restored"] = absmax
    spec = by_the_spec(packed, absmax, x.numel(), block_size)
    shaped = F.dequantize_4bit(packed.reshape(-1, 1), state).float()
    if bnb_is_wrong:
        # The bug this case is for: on a CPU the scale of another block is taken when
        # d_in % 16 == 0 and d_in % block_size != 0.
        assert not torch.equal(shaped, spec.to(x.dtype).float().reshape(x.shape)), f"{key}: bitsandbytes is right here"
        tensors[f"{key}.spec"] = spec
        return
    for dtype in outputs:
        # One row is restored right whatever its length, so the matrix is restored as one.
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, absmax, block_size, "nf4", (1, x.numel()), DTYPES[dtype]
        ).flatten()
        cast = spec.to(DTYPES[dtype])
        if dtype == "bf16":
            # With AVX-512 the processor's own conversion is used, which turns subnormals into zeros.
            flat = torch.where((cast.abs() < torch.finfo(cast.dtype).smallest_normal) & (flat == 0), cast, flat)
        assert same(flat, cast), f"{key}: bitsandbytes restores {dtype} in an unknown way"
        tensors[f"{key}.{dtype}"] = flat


def edges(dtype):
    """Rows of 64 with what goes wrong in practice, in the range of the dtype."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    least = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    largest = min(3e38, info.max)
    small = 1e-30 if largest > 1e30 else 1e-4
    outlier = normal(64) * 1e-3
    outlier[41] = -7.5
    signs = torch.where(normal(64) < 0, -1.0, 1.0)
    ones = torch.zeros(64)
    ones[::3], ones[1::3], ones[2::9] = 1.0, -1.0, -0.0
    ends = torch.linspace(-1, 1, 64)
    rows = [
        torch.zeros(64),
        -torch.zeros(64),
        torch.full((64,), 0.37),
        torch.full((64,), -2.5),
        ones,
        ends,
        outlier,
        torch.cat([outlier[32:], torch.zeros(32)]),
        normal(64),
        normal(64) * small,
        normal(64) * 1e-2,
        normal(64) * min(1e30, largest / 100),
        normal(64).pow(5),  # heavy tails
        torch.where(normal(64).abs() < 1, 0.0, normal(64)),  # sparse
        ends * tiny,
        ends * tiny * 0.5,  # subnormal
        signs * least,  # the least subnormal alone
        ends * least * 90,
        ends * largest,
        signs * largest,
        torch.cat([normal(32) * small, normal(32) * (largest / 8)]),  # far apart in one block of 64
    ]
    if dtype != torch.float16:
        floor = torch.tensor(1e-38)  # bitsandbytes' floor under a scale, and its neighbours
        rows += [ends * floor * f for f in (0.25, 1 - 2.0**-6, 1.0, 1 + 2.0**-6, 4.0)]
    return torch.stack(rows).to(dtype)


def tensors_of_edges():
    tensors = {}
    for name, dtype in DTYPES.items():
        x = edges(dtype)
        assert torch.isfinite(x).all()
        # Less three values: an odd count and a partial last block, for the true division there.
        cut = x.flatten()[:-3].reshape(1, -1).clone()
        for block_size in BLOCK_SIZES:
            quantize(tensors, f"edges_{name}", x, block_size, DTYPES if block_size in (32, 64) else ())
            quantize(tensors, f"cut_{name}", cut, block_size, ["f32"] if block_size == 128 else ())
        # Partial last blocks of zeros and of the least subnormal, whose stored scale is the floor.
        for value in (0.0, x[x > 0].min()):
            x_floor = torch.full((1, 97), value, dtype=dtype)
            quantize(tensors, f"floor_{'least' if value else 'zero'}_{name}", x_floor, 64, ["f32"])
    # Each threshold and its neighbours, each codebook value, zeros and ends; 31 of them after the largest of a block.
    values = torch.cat([THRESHOLDS, THRESHOLDS.nextafter(torch.tensor(2.0)), THRESHOLDS.nextafter(torch.tensor(-2.0)),
                        CODEBOOK, torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149)])])
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).reshape(-1, 31)
    blocks = torch.cat([torch.ones(len(values), 1), values], 1)
    # Scaling by 1 and 2^-3 is exact and keeps the ties; 3.7 and 0.0123 move them by rounding; the last 20 of the
    # values again in a partial block.
    x = torch.cat([(blocks * s).flatten() for s in (1.0, 0.125, 3.7, 0.0123)] + [blocks.flatten()[:20] * 3.7])
    quantize(tensors, "thresholds", x.reshape(1, -1), 32, DTYPES)
    quantize(tensors, "thresholds", x.reshape(1, -1), 64, ["f32"])
    return tensors


def tensors_of_shapes():
    tensors = {}
    # Two blocks of the largest size and one value, an odd count; magnitudes change by powers of ten along the way.
    x = normal(3, 2731) * 10 ** torch.linspace(-6, 4, 3 * 2731).reshape(3, 2731).round()
    for name, dtype in DTYPES.items():
        for block_size in BLOCK_SIZES:
            outputs = ["f32"] if (name, block_size) == ("f16", 4096) else ()
            quantize(tensors, f"long_{name}", x.to(dtype), block_size, outputs)
        # Rows that are no multiple of the block, odd counts, blocks over the ends of rows, less than one block.
        for shape in [(5, 100), (3, 77), (1, 1), (1, 2), (1, 31), (33, 1), (1, 63), (1, 65), (2, 64), (10, 34)]:
            x_small = (normal(*shape) * 0.02).to(dtype)
            quantize(tensors, f"rows_{shape[0]}x{shape[1]}_{name}", x_small, 64, DTYPES if name == "f32" else ["f32"])
    for shape in [(2, 1376), (5, 96), (5, 48), (6, 32)]:
        x = normal(*shape) * 10 ** normal(shape[0], 1).round()
        quantize(tensors, f"wrong_{shape[0]}x{shape[1]}", x.to(torch.bfloat16), 64, bnb_is_wrong=True)
    return tensors


def tensors_of_double():
    tensors = {"dynamic_map": F.create_dynamic_map(signed=True)}
    # 261 blocks of 64, so two groups, and an odd count of values.
    quantize(tensors, "normal_bf16", (normal(129, 129) * 0.02).to(torch.bfloat16), 64, ["bf16"], double=True)
    # 272 blocks of 32, the scales orders of magnitude apart.
    spread = normal(34, 256) * 10 ** normal(34, 1)
    quantize(tensors, "spread_f16", spread.clamp(-6e4, 6e4).to(torch.float16), 32, ["f32"], double=True)
    # 256 blocks, just one full group.
    quantize(tensors, "group_f32", normal(32, 256), 32, ["f16"], double=True)
    quantize(tensors, "one_block_f32", normal(4, 8), 64, DTYPES, double=True)
    # All scales equal: the second-level scale is 0.
    quantize(tensors, "equal_f32", torch.linspace(-3, 3, 64).repeat(5, 1), 64, ["f32"], double=True)
    quantize(tensors, "zeros_f32", torch.zeros(2, 128), 64, ["f32"], double=True)
    # Scales as a large matrix has them, for the share of codes in which the two differ.
    scales = torch.from_numpy(np.abs(rng.standard_normal((8200, 64))).max(1).astype(np.float32) * 0.02)
    codes, state = F.quantize_blockwise(scales - scales.mean(), blocksize=256)
    tensors["large.scales"] = scales
    tensors["large.codes"] = codes
    tensors["large.nested_absmax"] = state.absmax
    tensors["large.nested_offset"] = scales.mean().reshape(1)
    return tensors


for name, tensors in [
    ("edges", tensors_of_edges()),
    ("shapes", tensors_of_shapes()),
    ("double", tensors_of_double()),
]:
    path = HERE / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes")
