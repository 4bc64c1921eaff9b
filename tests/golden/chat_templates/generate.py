"""What transformers' `apply_chat_template` makes of the templates beside this file: `expected.json`.

    python tests/golden/chat_templates/generate.py

The templates are written for these tests. Each uses what the templates of some family of models use.
Made with transformers 5.24.0 and Jinja2 3.1.6.
"""

import json
import re
from pathlib import Path

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
NOW = 1732540800  # 2024-11-25 13:20:00 UTC
MARK = re.compile(r"\{%-? generation -?%\}")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class Clock(chat_template_utils.datetime):
    @classmethod
    def now(cls, tz=None):
        import datetime

        return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc)


chat_template_utils.datetime = Clock

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place & <time>, in °C.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town's name"},
                "days": {"type": "integer", "description": "How many \"days\""},
                "hours": {"type": "array", "items": {"type": "number"}},
                "options": {"type": "object", "additionalProperties": {"type": ["string", "boolean"]}},
            },
            "required": ["place"],
        },
        "return": {"type": "string"},
    },
}
NOTHING = {
    "type": "function",
    "function": {
        "name": "nothing",
        "description": "Does nothing.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "question": [turn("user", "What is 1 + 1?")],
    "answer": [turn("user", "What is 1 + 1?"), turn("assistant", "2")],
    "system": [turn("system", " Be brief. "), turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Bye")],
    "several": [
        turn("system", "Be brief."),
        turn("user", "First?\n"),
        turn("assistant", "  One.\n\n"),
        turn("user", "Second?"),
        turn("assistant", "Two."),
    ],
    "letters": [
        turn("user", "<b>é & \"ü\"</b> 'quoted' \\n {{ x }} {% y %} \u2028 \U0001f600"),
        turn("assistant", "a\tb\r\nc </s> \x1f"),
    ],
    "thought": [
        turn("user", "Think."),
        turn("assistant", "<think>\nOne and one.\n</think>\n\nTwo."),
        turn("user", "Again."),
        turn("assistant", "Two.", reasoning_content="\nStill two.\n"),
    ],
    "tools": [
        turn("user", "Weather in Zürich?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "id": "call00001",
                    "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": 2, "x": 1.0}},
                }
            ],
        },
        turn("tool", '{"celsius": 4.5}', name="get_weather", tool_call_id="call00001"),
        turn("assistant", "4.5 °C."),
    ],
    "calls": [
        turn("system", "Call."),
        turn("user", "Both."),
        turn(
            "assistant",
            "I call two.",
            tool_calls=[
                {"type": "function", "id": "call00001", "function": {"name": "nothing", "arguments": {}}},
                {"type": "function", "id": "call00002", "function": {"name": "get_weather", "arguments": "{\"place\": \"Ulm\"}"}},
            ],
        ),
        turn("tool", "done", tool_call_id="call00001"),
        turn("tool", "cold", tool_call_id="call00002"),
    ],
    "parts": [
        turn("system", [{"type": "text", "text": "Look."}]),
        turn("user", [{"type": "image"}, {"type": "text", "text": " What is it? "}]),
        turn("assistant", [{"type": "text", "text": "A cat."}]),
    ],
    "wrong": [turn("assistant", "I begin."), turn("user", "No.")],
    "roles": [turn("developer", "d"), turn("user", "u"), turn("user", "u2"), turn("critic", "c", score=0.5, ok=True, tags=["a", 1])],
}

OPTIONS = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [WEATHER, NOTHING], "add_generation_prompt": True},
    "variables": {
        "add_generation_prompt": True,
        "tools": [WEATHER],
        "tools_in_user_message": False,
        "enable_thinking": False,
        "date_string": "01 Feb 2003",
    },
    "documents": {"documents": [{"title": "A", "text": "b & c", "pages": 3}, {"title": "D", "text": "e"}]},
    "continued": {"continue_final_message": True},
}


def tokenizer():
    plain = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, **TOKENS)


def spans(text, indices):
    return [[len(text[:start].encode()), len(text[:end].encode())] for start, end in indices]


def main():
    tok = tokenizer()
    cases = []
    for path in sorted((HERE / "templates").glob("*.jinja")):
        source = path.read_bytes().decode()
        for name, messages in CONVERSATIONS.items():
            for option, kwargs in OPTIONS.items():
                if path.stem == "expressions" and (name != "system" or option != "plain"):
                    continue
                if option == "documents" and path.stem != "schema":
                    continue
                if option in ("tools", "variables") and "tools" not in source:
                    continue
                case = {"template": path.stem, "conversation": name, "option": option}
                try:
                    text = tok.apply_chat_template(messages, chat_template=source, tokenize=False, **kwargs)
                    case["text"] = text
                except Exception as error:
                    case["error"] = type(error).__name__
                    if isinstance(error, jinja2.exceptions.TemplateError) and not isinstance(
                        error, (jinja2.exceptions.UndefinedError, jinja2.exceptions.SecurityError)
                    ):
                        case["message"] = str(error)
                if "text" in case and MARK.search(source) and option != "continued":
                    normal = chat_template_utils._normalize_chat_messages(messages)
                    variables = {**tok.special_tokens_map, **kwargs}
                    texts, indices = chat_template_utils.render_jinja_template(
                        [normal], chat_template=source, return_assistant_tokens_mask=True, **variables
                    )
                    assert texts == [case["text"]]
                    case["spans"] = spans(texts[0], indices[0])
                cases.append(case)
    expected = {
        "versions": {"transformers": transformers.__version__, "jinja2": jinja2.__version__},
        "now": NOW,
        "tokens": tok.special_tokens_map,
        "conversations": CONVERSATIONS,
        "options": OPTIONS,
        "cases": cases,
    }
    lines = json.dumps({k: v for k, v in expected.items() if k != "cases"}, ensure_ascii=False, indent=1)
    body = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / "expected.json").write_text(lines[:-2] + ',\n "cases": [\n' + body + "\n ]\n}\n")
    failed = sum("error" in case for case in cases)
    print(f"{len(cases)} cases, {failed} of them errors")


main()
