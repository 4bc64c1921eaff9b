"""Makes the fixtures of tests/llama.rs with transformers. Run: python tests/golden/llama/generate.py

    untied/            2 layers, 4 query and 2 key-value heads, biases everywhere, untied head, bf16 in two shards
    tied/              2 layers, 4 query heads and 1 key-value head, no biases, tied head, llama3 RoPE, f32 in one file
    <name>/golden.safetensors
                       input_ids I64 [2, 24], logits F32 [2, 24, vocab], prompts' greedy continuations
    rope.safetensors   q, k and their rotation, for the plain and the llama3 frequencies

All arithmetic of the goldens is f32, also for the bf16 weights.
"""

import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

HERE = pathlib.Path(__file__).parent
VOCAB, NEW_TOKENS = 96, 12
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def model(config: LlamaConfig, name: str, dtype: torch.dtype, shard: str) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # transformers begins biases at 0 and norms at 1, and its normal of 0.02 leaves attention nearly uniform:
        # with such weights many a mistake would hide below the tolerance.
        for key, parameter in llama.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in key or "lm_head" in key:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 0.2)
        llama.to(dtype)
        directory = HERE / name
        llama.save_pretrained(directory, max_shard_size=shard)
        (directory / "generation_config.json").unlink(missing_ok=True)
        # Read back: `to` rounds the rotary frequencies too, which loading computes afresh in f32.
        llama = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

        tokens = torch.randint(0, VOCAB, (2, 24))
        golden = {"input_ids": tokens, "logits": llama(tokens).logits.contiguous()}
        # Prompts of unequal length, each continued alone.
        for index, length in enumerate((9, 3, 6)):
            prompt = torch.randint(0, VOCAB, (1, length))
            text = prompt
            smallest = float("inf")
            for _ in range(NEW_TOKENS):
                logits = llama(text).logits[0, -1]
                best = logits.topk(2).values
                smallest = min(smallest, (best[0] - best[1]).item())
                text = torch.cat([text, logits.argmax().view(1, 1)], 1)
            # A near tie could be broken differently by another order of summation.
            assert smallest > 1e-3, (name, index, smallest)
            golden[f"prompt.{index}"] = prompt[0].contiguous()
            golden[f"continuation.{index}"] = text[0, length:].contiguous()
        save_file(golden, directory / "golden.safetensors")
        print(name, "logits", golden["logits"].abs().max().item())


def rope() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    positions = torch.tensor([[0, 1, 2, 3, 50, 51, 127], [5, 6, 7, 8, 9, 10, 11]])
    golden = {"q": q, "k": k, "positions": positions}
    for name, parameters in (("default", PLAIN), ("llama3", LLAMA3)):
        config = LlamaConfig(
            hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_parameters=parameters
        )
        cos, sin = LlamaRotaryEmbedding(config)(q, positions)
        rotated = apply_rotary_pos_emb(q, k, cos, sin)
        golden[f"{name}.q"], golden[f"{name}.k"] = (x.contiguous() for x in rotated)
    save_file(golden, HERE / "rope.safetensors")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    common = dict(vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
    model(
        LlamaConfig(
            **common,
            hidden_size=32,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=16,  # not hidden_size / heads
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            rope_parameters=PLAIN,
            eos_token_id=[1, 2],
        ),
        "untied",
        torch.bfloat16,
        "30KB",
    )
    model(
        LlamaConfig(
            **common,
            hidden_size=32,
            intermediate_size=40,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            rope_parameters=LLAMA3,
        ),
        "tied",
        torch.float32,
        "1GB",
    )
    rope()
    print("transformers", transformers.__version__, "torch", torch.__version__)
