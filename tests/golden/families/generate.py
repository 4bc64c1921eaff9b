"""Makes the checkpoints of tests/base/families with transformers. Run: python tests/golden/families/generate.py

Each folder holds a tiny random model of one family as `save_pretrained` writes it, and for some of them `expected.safetensors`
with an input and the outputs in f32:

    llama, gpt2, bert   input_ids I64 [2, 7] and logits F32 [2, 7, vocab]
    t5                  input_ids I64 [2, 7], decoder_input_ids I64 [2, 5] and logits F32 [2, 5, vocab]

    gpt2_hub            gpt2 as the files of the hub have it: without the prefix `transformer.`, with the buffers `attn.bias`
    gpt2_nf4            gpt2 as transformers and bitsandbytes pack it in NF4
    bert_gamma          bert as files of 2018 have it: `LayerNorm.gamma` and `.beta`, the tied decoder, `position_ids`
    gemma3_vision       the text model of gemma3 as the files with a vision tower have it
    sharded             a tied Llama in three files with an index. `expected.safetensors` has the logits, which transformers also
                        computes for every false index that tests/base/index.rs makes of it; that is asserted here
"""

import json
import pathlib
import shutil

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForPreTraining,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

HERE = pathlib.Path(__file__).parent
VOCAB = 13


def randomize(model: torch.nn.Module) -> None:
    """Values so large that a transposed or exchanged tensor shows."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            last = key.split(".")[-1]
            if last == "bias":
                parameter.normal_(0.0, 0.3)
            elif "norm" in key.lower() or "ln_" in key:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.4)


def save(name: str, model: torch.nn.Module, **options: object) -> pathlib.Path:
    randomize(model)
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model.eval().save_pretrained(directory, **options)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory


def expect(directory: pathlib.Path, model: torch.nn.Module, **inputs: torch.Tensor) -> None:
    with torch.no_grad():
        output = model.eval()(**inputs)
    logits = getattr(output, "logits", None)
    logits = output.prediction_logits if logits is None else logits
    print(directory.name, "logits up to", logits.abs().max().item())
    save_file({**inputs, "logits": logits.contiguous()}, directory / "expected.safetensors")


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape)


def rename(source: str, target: str, change) -> None:
    """The tensors of one model under other names in another folder, with its configuration and outputs."""
    directory = HERE / target
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    tensors = change(load_file(HERE / source / "model.safetensors"))
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    shutil.copy(HERE / source / "config.json", directory)


def decoders() -> None:
    common = dict(vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
    common |= dict(pad_token_id=None, bos_token_id=1, eos_token_id=2)
    llama = LlamaForCausalLM(LlamaConfig(**common, num_hidden_layers=2, head_dim=4, tie_word_embeddings=False))
    expect(save("llama", llama), llama, input_ids=ids(2, 7))
    save("mistral", MistralForCausalLM(MistralConfig(**common, num_hidden_layers=1, head_dim=4, tie_word_embeddings=False)))
    save("qwen2", Qwen2ForCausalLM(Qwen2Config(**common, num_hidden_layers=1, tie_word_embeddings=True)))
    save("qwen3", Qwen3ForCausalLM(Qwen3Config(**common, num_hidden_layers=1, head_dim=4, tie_word_embeddings=True)))
    save("gemma2", Gemma2ForCausalLM(Gemma2Config(**common, num_hidden_layers=1, head_dim=4, query_pre_attn_scalar=4)))
    save("gemma3", Gemma3ForCausalLM(Gemma3TextConfig(**common, num_hidden_layers=1, head_dim=4, query_pre_attn_scalar=4)))
    save("phi3", Phi3ForCausalLM(Phi3Config(**common, num_hidden_layers=1, tie_word_embeddings=False)))

    def with_vision(tensors):
        tensors = {f"language_model.{key}": value for key, value in tensors.items()}
        tensors["vision_tower.vision_model.embeddings.position_embedding.weight"] = torch.randn(4, 6)
        tensors["multi_modal_projector.mm_input_projection_weight"] = torch.randn(6, 8)
        return tensors

    rename("gemma3", "gemma3_vision", with_vision)


def gpt2() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    directory = save("gpt2", model)
    expect(directory, model, input_ids=ids(2, 7))

    def hub(tensors):
        tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        for layer in range(config.n_layer):
            tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
        return tensors

    rename("gpt2", "gpt2_hub", hub)
    again = GPT2LMHeadModel.from_pretrained(HERE / "gpt2_hub")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = GPT2LMHeadModel.from_pretrained(directory, quantization_config=quantization, device_map="cpu", dtype=torch.float32)
    shutil.rmtree(HERE / "gpt2_nf4", ignore_errors=True)
    packed.save_pretrained(HERE / "gpt2_nf4")
    (HERE / "gpt2_nf4" / "generation_config.json").unlink(missing_ok=True)


def bert() -> None:
    config = BertConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, max_position_embeddings=16)
    model = BertForPreTraining(config)
    directory = save("bert", model)
    expect(directory, model, input_ids=ids(2, 7))

    def old(tensors):
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, gamma in names.items():
            tensors = {key.replace(new, gamma): value for key, value in tensors.items()}
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
        tensors["bert.embeddings.position_ids"] = torch.arange(16)[None]
        return tensors

    rename("bert", "bert_gamma", old)
    again = BertForPreTraining.from_pretrained(HERE / "bert_gamma")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def others() -> None:
    config = T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, relative_attention_num_buckets=8, relative_attention_max_distance=12, feed_forward_proj="relu", decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(config)
    expect(save("t5", t5), t5, input_ids=ids(2, 7), decoder_input_ids=ids(2, 5))
    config = WhisperConfig(vocab_size=VOCAB, num_mel_bins=4, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_source_positions=6, max_target_positions=5, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)
    save("whisper", WhisperForConditionalGeneration(config))
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4, num_labels=3)
    save("vit", ViTForImageClassification(config))


def sharded() -> None:
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=4, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    directory = save("sharded", model, max_shard_size="1KB")
    tokens = ids(2, 7)
    expect(directory, model, input_ids=tokens)
    logits = load_file(directory / "expected.safetensors")["logits"]
    path = directory / "model.safetensors.index.json"
    text = path.read_text()
    files = sorted(set(json.loads(text)["weight_map"].values()))
    assert len(files) == 3, files

    def same(change) -> None:
        index = json.loads(text)
        change(index)
        path.write_text(json.dumps(index))
        again = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, logits), change

    same(lambda index: index["weight_map"].__setitem__("mtp.fc.weight", files[0]))
    same(lambda index: index["weight_map"].__setitem__("lm_head.weight", files[0]))
    same(lambda index: index["weight_map"].__setitem__("model.norm.weight", files[0]))
    same(lambda index: index["weight_map"].pop("model.norm.weight"))
    same(lambda index: index["metadata"].__setitem__("total_size", 3960))
    path.write_text(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    decoders()
    gpt2()
    bert()
    others()
    sharded()
    for directory in sorted(path for path in HERE.iterdir() if path.is_dir()):
        for file in sorted(directory.glob("model*.safetensors")):
            with safe_open(file, "pt") as tensors:
                print(directory.name, file.stat().st_size, *tensors.keys())
    print("transformers", transformers.__version__, "torch", torch.__version__)
