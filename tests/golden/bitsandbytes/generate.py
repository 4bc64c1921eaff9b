"""Makes the fixtures of tests/bitsandbytes with transformers and bitsandbytes. Run: python tests/golden/bitsandbytes/generate.py

    nf4/        NF4, states of bf16, a tied head, no biases; one file
    double/     NF4 with double quantisation, states of bf16, an untied head, biases; several shards, between which the tensors
                of one weight are divided too
    storage/    NF4 whose bytes are called bf16 (`quant_storage`), states of f32; one file
    fp4/        FP4 with double quantisation, states of f16; one file
    linears/    `Linear4bit` layers alone: block sizes, odd shapes, element types; digests.json as above

Each of the first four is a Llama as `save_pretrained` writes it, and beside it
    expected.safetensors    input_ids I64 [2, 16], logits F32 [2, 16, vocab]
    digests.json            SHA-256 of each quantised weight, restored: F32, little-endian, row-major [d_out, d_in]
The logits are those of a dense Llama in f32 on the restored weights. They are restored here, by the specification, and not by
bitsandbytes, whose CPU version is wrong for some shapes and computes in bf16. Where both can be right they are compared.
"""

import hashlib
import json
import pathlib
import shutil

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
VOCAB = 64


def restored(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight `name` in f32, `[d_out, d_in]`."""
    parts = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}
    (state,) = (json.loads(bytes(value.tolist())) for key, value in parts.items() if key.startswith("quant_state."))
    absmax = parts["absmax"]
    if "nested_offset" in state:
        assert state["nested_blocksize"] == 256 and state["nested_dtype"] == "float32", state
        groups = parts["nested_absmax"].repeat_interleave(256)[: absmax.numel()]
        absmax = parts["nested_quant_map"][absmax.long()] * groups + torch.tensor(state["nested_offset"])
    packed = tensors[name].flatten().view(torch.uint8)
    count = torch.Size(state["shape"]).numel()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
    values = parts["quant_map"][codes] * absmax.repeat_interleave(state["blocksize"])[:count]
    return values.reshape(state["shape"])


def weights(tensors: dict[str, torch.Tensor]) -> list[str]:
    return sorted(key.split(".quant_state.")[0] for key in tensors if ".quant_state." in key)


def digest(values: torch.Tensor) -> str:
    assert values.dtype == torch.float32 and values.isfinite().all()
    return hashlib.sha256(values.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def llama(name: str, dtype: torch.dtype, shard: str, config: dict, **quantization: object) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **config,
    )
    dense = LlamaForCausalLM(config)
    with torch.no_grad():
        # As in tests/golden/llama: with transformers' initial values many a mistake would hide below the tolerance.
        for key, parameter in dense.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in key or "lm_head" in key:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 0.2)
    directory, base = HERE / name, HERE / f"{name}.base"
    shutil.rmtree(directory, ignore_errors=True)
    dense.to(dtype).save_pretrained(base)
    quantized = LlamaForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **quantization),
        dtype=dtype,
        device_map="cpu",
    )
    # Before any forward pass: one in eval mode would change the scales.
    quantized.save_pretrained(directory, max_shard_size=shard)
    shutil.rmtree(base)
    (directory / "generation_config.json").unlink()

    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    names = weights(tensors)
    state = {key: value.float() for key, value in tensors.items() if not any(key.startswith(name) for name in names)}
    modules = dict(quantized.named_modules())
    for key in names:
        state[key] = restored(key, tensors)
        parameter = modules[key.removesuffix(".weight")].weight
        by_bitsandbytes = F.dequantize_4bit(parameter.data, parameter.quant_state)
        # d_in is a multiple of the block, so bitsandbytes takes the right scales.
        assert torch.equal(by_bitsandbytes, state[key].to(dtype)), key
    llama = LlamaForCausalLM(config).float().eval()
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    llama.tie_weights()
    tokens = torch.randint(0, VOCAB, (2, 16))
    with torch.no_grad():
        logits = llama(tokens).logits.contiguous()
    save_file({"input_ids": tokens, "logits": logits}, directory / "expected.safetensors")
    write_json(directory / "digests.json", {key: digest(state[key]) for key in names})
    print(name, "logits", logits.abs().max().item(), sorted(path.name for path in directory.iterdir()))


def linears() -> None:
    torch.manual_seed(1)
    directory = HERE / "linears"
    directory.mkdir(exist_ok=True)
    tensors = {}
    # name: (quant_type, d_out, d_in, block, dtype, double, storage, bias)
    cases = {
        "plain": ("nf4", 8, 64, 64, torch.float32, False, torch.uint8, True),
        "odd": ("nf4", 7, 33, 64, torch.float32, False, torch.uint8, False),
        "odd_double": ("nf4", 33, 65, 32, torch.bfloat16, True, torch.uint8, True),
        "small": ("nf4", 3, 5, 64, torch.float16, True, torch.uint8, False),
        "groups": ("nf4", 100, 96, 32, torch.float16, True, torch.uint8, False),
        "block128": ("nf4", 10, 96, 128, torch.bfloat16, False, torch.uint8, False),
        "block4096": ("nf4", 9, 500, 4096, torch.float32, True, torch.uint8, False),
        "as_f32": ("nf4", 16, 48, 64, torch.bfloat16, False, torch.float32, False),
        "as_f16": ("nf4", 16, 48, 64, torch.float16, True, torch.float16, True),
        "as_i8": ("nf4", 5, 6, 64, torch.float32, False, torch.int8, False),
        "as_f64": ("nf4", 16, 48, 64, torch.float32, False, torch.float64, False),
        "fp4": ("fp4", 7, 33, 64, torch.float32, False, torch.uint8, True),
        "fp4_double": ("fp4", 12, 64, 32, torch.bfloat16, True, torch.bfloat16, False),
    }
    for name, (quant_type, d_out, d_in, block, dtype, double, storage, bias) in cases.items():
        layer = bnb.nn.Linear4bit(
            d_in, d_out, bias, compress_statistics=double, quant_type=quant_type, quant_storage=storage
        )
        weight = (torch.randn(d_out, d_in) * 10 ** torch.randn(d_out, 1)).to(dtype)
        layer.weight = bnb.nn.Params4bit(
            weight, False, None, block, double, quant_type, storage, layer
        )
        layer.to("cpu")
        for key, value in layer.state_dict().items():
            tensors[f"{name}.{key}"] = value.to(dtype) if key == "bias" else value
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "digests.json", {key: digest(restored(key, tensors)) for key in weights(tensors)})


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    common = dict(num_hidden_layers=1, num_key_value_heads=2, intermediate_size=128)
    llama("nf4", torch.bfloat16, "1GB", dict(common, tie_word_embeddings=True), bnb_4bit_quant_type="nf4")
    llama(
        "double",
        torch.bfloat16,
        "11KB",
        # 320 blocks, so two groups of scales.
        dict(common, num_hidden_layers=2, intermediate_size=320, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    llama(
        "storage",
        torch.float32,
        "1GB",
        dict(common, tie_word_embeddings=False),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage="bfloat16",
    )
    llama(
        "fp4",
        torch.float16,
        "1GB",
        dict(common, tie_word_embeddings=False),
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float16",
    )
    linears()
    print("transformers", transformers.__version__, "bitsandbytes", bnb.__version__, "torch", torch.__version__)
