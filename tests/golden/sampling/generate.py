"""What transformers' own processors of logits make of them, for `tests/align/rollout/`.

    python tests/golden/sampling/generate.py

needs torch and transformers (written with the versions that the file names) and rewrites `processors.json` beside it. The logits are
numbers of f32; all is computed in f64, so that no probability lies within rounding of a boundary.
"""

import json
import pathlib

import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCABULARY = 48

CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"min_p": 0.4},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 1.7, "top_k": 9},
    {"temperature": 0.6, "top_p": 0.8},
    {"temperature": 2.5, "min_p": 0.1},
    {"top_k": 12, "top_p": 0.7},
    {"top_p": 0.9, "min_p": 0.2},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.85, "min_p": 0.05},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.85, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.9, "top_k": 3, "top_p": 0.2, "min_p": 0.9, "repetition_penalty": 2.0},
]


def processors(case):
    """In the order of `GenerationMixin`: penalties, then temperature, top-k, top-p, min-p."""
    result = LogitsProcessorList()
    if "repetition_penalty" in case:
        result.append(RepetitionPenaltyLogitsProcessor(penalty=case["repetition_penalty"]))
    if "temperature" in case:
        result.append(TemperatureLogitsWarper(case["temperature"]))
    if "top_k" in case:
        result.append(TopKLogitsWarper(top_k=case["top_k"]))
    if "top_p" in case:
        result.append(TopPLogitsWarper(top_p=case["top_p"]))
    if "min_p" in case:
        result.append(MinPLogitsWarper(min_p=case["min_p"]))
    return result


def main():
    torch.manual_seed(0)
    rows = []
    for index in range(4):
        logits = torch.randn(VOCABULARY, dtype=torch.float32) * (1.0 + index)
        if index == 1:
            # Ties at every place of the ranking, and tokens that are impossible.
            logits = (logits * 2).round() / 2
            logits[5] = logits[17] = -float("inf")
        context = torch.randint(VOCABULARY, (6,))
        context[3] = context[0]
        rows.append((logits, context))
    cases = []
    for case in CASES:
        for index, (logits, context) in enumerate(rows):
            # transformers' sort is not stable, so its choice among equal tokens at the edge of top-p is nobody's.
            if index == 1 and "top_p" in case:
                continue
            scores = processors(case)(context[None], logits.double()[None])[0]
            probabilities = scores.softmax(-1)
            cases.append(
                {"options": case, "row": index, "probabilities": [float(f"{p:.17g}") for p in probabilities.tolist()]}
            )
    text = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [
            {"logits": [None if v == -float("inf") else v for v in logits.tolist()], "context": context.tolist()}
            for logits, context in rows
        ],
        "cases": cases,
    }
    for case in text["cases"]:
        case["probabilities"] = {str(i): p for i, p in enumerate(case["probabilities"]) if p > 0}
    path = pathlib.Path(__file__).with_name("processors.json")
    path.write_text(json.dumps(text, separators=(",", ":")) + "\n")
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
