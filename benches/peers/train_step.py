"""A whole training step through transformers, PEFT and bitsandbytes; its counterpart is common/train_step.rs.

The same sizes, tokens all supervised, AdamW (torch's fused one), no gradient checkpointing. Everything but the factors
is in the dtype of the step; attention is torch's scaled_dot_product_attention, the default.
"""

import bitsandbytes as bnb
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, SEQ, RANK = 2, 256, 16
VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 2048, 512, 1408, 8, 8


def train_step(packed, dtype):
    """Makes the model, and returns what does one step."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if packed:
        pack(model, dtype)
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Seven layers a block, two factors each.
    assert len(trained) == 2 * 7 * LAYERS, len(trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    # One more token than inputs, as the model shifts the labels itself.
    tokens = torch.randint(VOCAB, (BATCH, SEQ + 1))
    inputs = tokens[:, :-1].contiguous()
    targets = tokens[:, 1:].contiguous()

    def run():
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def pack(model, dtype):
    """Every linear layer but the head becomes one of bitsandbytes, one at a time."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        packed = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
        packed.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, blocksize=64, compress_statistics=False, quant_type="nf4"
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.to("cpu"))
    model.is_loaded_in_4bit = True
