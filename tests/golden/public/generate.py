"""Expressions for `target_modules` of the kinds that people publish, and what Python says of them. Run: python generate.py

    patterns.json   [{pattern, names: {path: whether `re.fullmatch(pattern, path)` matches}}]
    configs.json    kept by hand: [{kind, loads, config}], configurations of the kinds that people publish, and whether PEFT's LoRA is what they are

The first patterns use what Python's `re` has beside plain expressions; the others are those that unsloth makes for families of layers.
"""

import json
import pathlib
import re

PATTERNS = [
    r"model\.layers\.\d{,2}\.self_attn\.q_proj",
    r"(?i)MODEL\.layers\.\d+\.self_attn\.Q_PROJ",
    r"model\.layers\.(?P<n>\d+)\.self_attn\.(?:q|k)_proj\Z",
    r".*\.(?:[0-9]|1[0-5])\.self_attn\.(q|v)_proj",
    r"^(?!.*(?:visual|vision)).*(?:q_proj|v_proj).*",
    r"model.layers.[0-9]+.self_attn.q_proj$",
    r"(?:.*\.)?(?<!vision\.)q_proj",
    r"model\.layers\.(\d)\1\.self_attn\.q_proj",
    r"[^.]*\.layers\.\d++\.self_attn\.q_proj",
    r"(?>model)\.layers\.\d+\.self_attn\.q_proj",
    r"model\.layers\.\d+\.self_attn\.q_proj|lm_head",
    r"(?x) model \. layers \. \d+ \. self_attn \. q_proj",
    r"\Amodel\.layers\.\d+\.self_attn\.q_proj",
    r"model\.layers\.[\w]+\.self_attn\.q_proj(?#comment)",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|qkv|proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|qkv|proj)))",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|qkv|proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|qkv|proj)))",
    r"(?:(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|qkv|proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|qkv|proj))))|(?:.*?\baudio_tower\.(?:.*\.)?q_proj\.linear)|(?:.*?\bembed_vision\.embedding_projection)",
    r"(?!x)x",
]

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.123.self_attn.q_proj",
    "model.layers.3.self_attn.v_proj",
    "model.visual.blocks.0.attn.qkv",
    "vision.q_proj",
    "q_proj",
    "lm_head",
    "MODEL.layers.0.self_attn.Q_PROJ",
    "model.layers.11.mlp.down_proj",
    "model.language_model.layers.3.self_attn.v_proj",
    "model.visual.blocks.0.attn.proj",
    "model.visual.blocks.0.attn.proj_drop",
    "model.visual.patch_embed.proj",
    "vision_tower.encoder.layers.0.self_attn.q_proj",
    "xmodel.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.xq_proj",
    "model.layers.0.self_attn.q_proj.linear",
    "model.audio_tower.layers.0.attention.q_proj.linear",
    "model.embed_vision.embedding_projection",
    "text_model.layers.0.mlp.fc1",
    "base.model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts.gate_proj",
]

if __name__ == "__main__":
    rows = [{"pattern": p, "names": {path: re.fullmatch(p, path) is not None for path in PATHS}} for p in PATTERNS]
    path = pathlib.Path(__file__).with_name("patterns.json")
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(sum(sum(row["names"].values()) for row in rows), "of", sum(len(row["names"]) for row in rows), "match")
