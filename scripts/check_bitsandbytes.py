"""Checks checkpoints in four bits with transformers and bitsandbytes, in both directions.

    python scripts/check_bitsandbytes.py

Needs cargo, transformers, accelerate, bitsandbytes and torch. `examples/bitsandbytes` packs a small Llama and writes it, plainly
and doubly quantised, in one file and in several. transformers loads each on a CPU; then

* its packed bytes, scales and maps are the file's, every one;
* its weights, restored by bitsandbytes, are the same as those restored here by the specification, to the bit;
* its files are those that transformers writes when it quantises the same base, byte for byte (doubly quantised, see below, the
  same tensors in the same files), and so is its configuration;
* its codes and plain scales are those that bitsandbytes makes of the dense weights itself; of doubly quantised scales, codes differ
  by at most one step on less than 1 % (see docs/design.md, "NF4");
* logits of a dense Llama in f32 on the restored weights are ours within 5e-5.

The other way round, what transformers quantises and saves (NF4 and FP4, plainly and doubly, one file and several) is read here, and
the logits compared. Every number is printed; the exit status is 0 only if all held.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import bitsandbytes.functional as F
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/golden/bitsandbytes"))
from generate import restored, weights  # noqa: E402

TOLERANCE = 5e-5
failed = []


def report(name: str, what: str, held: bool) -> None:
    print(f"{'ok    ' if held else 'FAILED'} {name}: {what}")
    if not held:
        failed.append((name, what))


def run(*arguments: object) -> None:
    command = ["cargo", "run", "--release", "--quiet", "--example", "bitsandbytes", "--", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True)


def read(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(directory.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def base(directory: pathlib.Path, dtype: torch.dtype, **config: object) -> None:
    """A dense Llama whose inner sizes are multiples of 64, where bitsandbytes is right on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=320,
        num_hidden_layers=11,  # so that names are in an order of their own
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **config,
    )
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for key, parameter in llama.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.5 if "embed" in key or "lm_head" in key else 0.1)
    llama.to(dtype).save_pretrained(directory)


def dense(directory: pathlib.Path) -> LlamaForCausalLM:
    """In f32 on the restored weights of a packed checkpoint."""
    tensors = read(directory)
    names = weights(tensors)
    state = {key: value.float() for key, value in tensors.items() if not any(key.startswith(name) for name in names)}
    state |= {name: restored(name, tensors) for name in names}
    config = LlamaConfig.from_pretrained(directory)
    del config.quantization_config
    llama = LlamaForCausalLM(config).float().eval()
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    llama.tie_weights()
    return llama


def logits_differ(name: str, directory: pathlib.Path, ours: pathlib.Path) -> None:
    ours = load_file(ours)
    with torch.no_grad():
        logits = dense(directory)(ours["input_ids"]).logits
    difference = (logits - ours["logits"]).abs().max().item()
    report(name, f"logits up to {logits.abs().max():.1f} differ by {difference:.1e}", difference < TOLERANCE)


def check_written(name: str, directory: pathlib.Path, source: pathlib.Path, scratch: pathlib.Path) -> None:
    tensors, names = read(directory), weights(read(directory))
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    state = model.state_dict()
    equal = [key for key in tensors if same(state[key], tensors[key])]
    report(name, f"{len(equal)} of {len(tensors)} tensors of {len(names)} packed weights and others are loaded as they are",
           len(equal) == len(tensors))
    modules = dict(model.named_modules())
    right = 0
    for key in names:
        parameter = modules[key.removesuffix(".weight")].weight
        values = F.dequantize_4bit(parameter.data, parameter.quant_state)
        right += torch.equal(values, restored(key, tensors).to(values.dtype))
    report(name, f"{right} of {len(names)} weights are restored by bitsandbytes to the bit", right == len(names))

    double = "double" in name
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    dtype = next(tensors[key].dtype for key in tensors if key.endswith("norm.weight"))
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype, device_map="cpu")
    # Saved from this one: transformers 5.24 cannot save a model that it loaded packed.
    theirs = scratch / f"{name}-theirs"
    files = [path.name for path in directory.glob("model*")]
    model.save_pretrained(theirs, max_shard_size="1TB" if len(files) == 1 else 20_000)
    own = read(theirs)
    equal = [file for file in files if (theirs / file).exists() and (theirs / file).read_bytes() == (directory / file).read_bytes()]
    # Codes and the mean of doubly quantised scales may differ, and with the mean the length of its JSON.
    held = sorted(files) == sorted(path.name for path in theirs.glob("model*"))
    if double:
        maps = [json.loads((path / "model.safetensors.index.json").read_text())["weight_map"] for path in (directory, theirs)]
        held &= maps[0] == maps[1]
    else:
        held &= len(equal) == len(files)
    report(name, f"{len(equal)} of {len(files)} files are those that transformers writes, to the byte", held)
    configs = [json.loads((path / "config.json").read_text()) for path in (directory, theirs)]
    differing = {key for key in configs[0] | configs[1] if configs[0].get(key) != configs[1].get(key)}
    report(name, f"config.json differs from transformers' in {sorted(differing)}", not differing)
    codes = sum(same(own[key], tensors[key]) for key in names)
    report(name, f"{codes} of {len(names)} weights have the codes that bitsandbytes gives them", codes == len(names))
    scales = [(own[f"{key}.absmax"], tensors[f"{key}.absmax"]) for key in names]
    if double:
        count = sum(ours.numel() for _, ours in scales)
        steps = torch.cat([(theirs.int() - ours.int()).abs() for theirs, ours in scales])
        share = (steps > 0).float().mean().item()
        report(name, f"of {count} codes of scales {share:.2%} differ, by {steps.max().item()} at most",
               steps.max().item() <= 1 and share < 0.01)
    else:
        equal = sum(same(theirs, ours) for theirs, ours in scales)
        report(name, f"{equal} of {len(names)} weights have bitsandbytes' scales", equal == len(names))
    logits_differ(name, directory, directory / "ours.safetensors")


def check_read(scratch: pathlib.Path, source: pathlib.Path, quant_type: str, double: bool, shard: str | int) -> None:
    name = f"{quant_type}{'-double' if double else ''}-of-transformers"
    directory = scratch / name
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    model.save_pretrained(directory, max_shard_size=shard)
    tokens, ours = scratch / "tokens.safetensors", scratch / f"{name}.safetensors"
    save_file({"input_ids": torch.randint(0, 96, (3, 20))}, tokens)
    run("read", "--model", directory, "--tokens", tokens, "--out", ours)
    logits_differ(f"{name}, {len(list(directory.glob('model*.safetensors')))} file(s)", directory, ours)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name, dtype, config in [
            ("untied-bf16", torch.bfloat16, dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
            ("tied-f32", torch.float32, dict(tie_word_embeddings=True)),
        ]:
            source, out = scratch / name, scratch / f"{name}-out"
            base(source, dtype, **config)
            run("write", "--model", source, "--out", out)
            for kind in ("plain", "double"):
                check_written(f"{name}-{kind}", out / kind, source, scratch)
            for quant_type in ("nf4", "fp4"):
                for double, shard in ((False, "1TB"), (True, 30_000)):
                    check_read(scratch / name, source, quant_type, double, shard)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
