"""Writes targets.json: what PEFT's own functions say of module paths under LoRA configurations.

Needs peft 0.21 and transformers; run `python generate.py` in this directory. tests/targets.rs reads the result.
"""

import json
from pathlib import Path

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

R, ALPHA = 8, 16

PATHS = [
    # Llama
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.self_attn.xq_proj",
    "model.layers.21.self_attn.v_proj",
    "model.layers.01.self_attn.q_proj",
    "lm_head",
    # GPT-2
    "transformer.h.0.attn.c_attn",
    "transformer.h.0.attn.c_proj",
    "transformer.h.0.mlp.c_fc",
    "transformer.h.0.mlp.c_proj",
    "transformer.h.1.attn.c_attn",
    "transformer.h.11.mlp.c_proj",
    # a mixture of experts, whose experts are numbered too
    "model.layers.1.block_sparse_moe.gate",
    "model.layers.1.block_sparse_moe.experts.0.w1",
    "model.layers.1.block_sparse_moe.experts.3.w2",
    "model.layers.3.block_sparse_moe.experts.1.w1",
    # BERT, T5, a vision-language model, a diffusion model
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.3.output.dense",
    "bert.pooler.dense",
    "classifier",
    "encoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.2.layer.1.EncDecAttention.v",
    "vision_tower.encoder.layers.0.self_attn.q_proj",
    "vision_tower.encoder.layers.1.mlp.fc1",
    "language_model.model.layers.0.self_attn.q_proj",
    "multi_modal_projector.linear_1",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    # odd ones
    "q_proj",
    "xq_proj",
    "layers.2.q_proj",
    "blocks.q_proj.inner",
    "a.b",
    "aXb",
    "0.q_proj",
    "model.Layers.0.Q_proj",
]

CONFIGS = [
    # lists
    dict(target_modules=["q_proj"]),
    dict(target_modules=["q_proj", "v_proj"]),
    dict(target_modules=["self_attn.q_proj", "mlp.down_proj"]),
    dict(target_modules=["model.layers.0.self_attn.q_proj", "lm_head"]),
    dict(target_modules=["proj"]),
    dict(target_modules=["to_out.0", "to_q", "query", "dense", "c_attn"]),
    dict(target_modules=["0"]),
    dict(target_modules=["a.b"]),
    # expressions
    dict(target_modules=r".*\.q_proj"),
    dict(target_modules="q_proj"),
    dict(target_modules=r"q_proj|.*\.v_proj"),
    dict(target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"),
    dict(target_modules=r"(?!.*vision).*(q_proj|v_proj)"),
    dict(target_modules=r"^(?!.*(?:vision_tower|multi_modal|lm_head)).*\.(?:q_proj|fc1|linear_1)$"),
    dict(target_modules=r"^(?=.*self_attn)(?!.*\.1\.).*proj"),
    dict(target_modules=r".*(?<!self_attn)\.[a-z_]*proj"),
    dict(target_modules=r".*\.(\d)\.[a-zA-Z_]*\.\1\..*"),
    dict(target_modules=r"(?P<n>\w+)\.(?:.*\.)?(?P=n)\w+.*"),
    dict(target_modules=r"(?i).*LAYERS\.0\..*Q_PROJ"),
    dict(target_modules=r".*\.layers\.[0-1]\..*\Z"),
    dict(target_modules=r"[\w.]+\.c_(?:attn|fc)"),
    dict(target_modules=r".*[^j]"),
    dict(target_modules=r".*\.\d{2,}\..*"),
    dict(target_modules=r"(?>model|language_model\.model)\.layers\..*"),
    # exclusion
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=["vision_tower.encoder.layers.0.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=["self_attn.v_proj", "xq_proj"]),
    dict(target_modules=["q_proj", "fc1"], exclude_modules=r"vision_tower\..*"),
    dict(target_modules=r".*proj", exclude_modules=r"^(?!model\.layers).*"),
    dict(target_modules=["q_proj"], exclude_modules=["layers.0"]),
    dict(target_modules=["q_proj"], exclude_modules=""),
    dict(target_modules=["q_proj"], exclude_modules=[]),
    dict(target_modules=["q_proj"], exclude_modules="all-linear"),
    # layers
    dict(target_modules=["q_proj", "v_proj", "w1", "w2", "c_attn"], layers_to_transform=[1, 3]),
    dict(target_modules=["q_proj", "c_attn", "query", "w1", "q"], layers_to_transform=0),
    dict(target_modules=["q_proj"], layers_to_transform=[]),
    dict(target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[21]),
    dict(target_modules=["q_proj", "v_proj", "w1", "w2"], layers_to_transform=[0, 1], layers_pattern="layers"),
    dict(target_modules=["w1", "w2"], layers_to_transform=[0, 3], layers_pattern=["experts"]),
    dict(target_modules=["q_proj", "c_attn", "query", "q", "v"], layers_to_transform=[0, 2], layers_pattern=["h", "layer", "block"]),
    dict(target_modules=["q_proj", "c_attn"], layers_to_transform=[0], layers_pattern=["h|layers"]),
    dict(target_modules=["q_proj", "c_attn"], layers_to_transform=[0, 10], layers_pattern=["(?:h|layers)"]),
    dict(target_modules=["q_proj", "to_q"], layers_to_transform=[0, 1], layers_pattern=[]),
    dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[0], layers_pattern=["layers"], exclude_modules=r"vision.*"),
    # rank and alpha
    dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4, "v_proj": 2}, alpha_pattern={"v_proj": 32}),
    dict(target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 4, "q_proj": 2}),
    dict(target_modules=["q_proj"], rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 4}),
    dict(target_modules=["q_proj"], rank_pattern={"^model.layers.0.self_attn.q_proj": 4, "^q_proj": 3}),
    dict(target_modules=["q_proj"], rank_pattern={"q_proj$": 5, "a.b": 6, r"a\.b": 7}),
    dict(target_modules=["q_proj"], rank_pattern={r"a\.b": 7, "a.b": 6, "_proj": 9}),
    dict(target_modules=r".*", rank_pattern={r"layers\.\d\..*": 4, r".*self_attn.*": 5, r"(?:c_attn|c_proj)": 6}),
    dict(target_modules=r".*", alpha_pattern={r".*(?<!x)q_proj": 1, r"(?!.*mlp).*proj": 2, "dense": 3}),
    dict(target_modules=r".*", rank_pattern={r"(\w+)\.(?:.*)\.\3.*": 4, "h|lm_head": 5, "mlp.up_proj|k_proj": 6}),
    dict(target_modules=r".*", rank_pattern={"a)|(classifier|b": 3, "0": 4, "": 5}, alpha_pattern={"experts.3.w2": 2, "w2": 64}),
]


def row(config):
    """Per path: matched or not, rank, alpha; as in LoraModel._create_and_replace."""
    matched, rank, alpha = [], [], []
    for path in PATHS:
        matched.append(int(bool(check_target_module_exists(config, path))))
        rank.append(config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r))
        alpha.append(config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha))
    return {"matched": "".join(map(str, matched)), "rank": rank, "alpha": alpha}


def all_linear(model, head, **options):
    """What "all-linear" means for a whole model: its linear modules, its head, and those PEFT takes."""
    config = LoraConfig(target_modules="all-linear", **options)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    config = _maybe_include_all_linear_layers(config, model)
    taken = [name for name in linear if check_target_module_exists(config, name)]
    return {"candidates": linear, "head": head, "config": {"target_modules": "all-linear", **options}, "taken": taken}


def main():
    rows = [{"config": c, **row(LoraConfig(r=R, lora_alpha=ALPHA, **c))} for c in CONFIGS]
    tiny = dict(vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **tiny))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    bert = BertForMaskedLM(BertConfig(**tiny))
    models = [
        all_linear(llama, "lm_head"),
        all_linear(llama, "lm_head", exclude_modules=["k_proj", "lm_head"]),
        all_linear(llama.model, None),
        all_linear(gpt2, "lm_head"),
        all_linear(bert, "cls.predictions.decoder", exclude_modules=r".*\.attention\..*"),
    ]
    data = {
        "peft": peft.__version__,
        "r": R,
        "lora_alpha": ALPHA,
        "paths": PATHS,
        "rows": rows,
        "all_linear": models,
    }
    # Rows on one line each.
    lines = json.dumps({k: v for k, v in data.items() if k not in ("rows", "all_linear")}, indent=1)[:-2]
    for key in ("rows", "all_linear"):
        lines += f',\n "{key}": [\n  ' + ",\n  ".join(json.dumps(r) for r in data[key]) + "\n ]"
    Path("targets.json").write_text(lines + "\n}\n")


if __name__ == "__main__":
    main()
