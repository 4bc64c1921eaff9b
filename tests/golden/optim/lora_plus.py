"""Which learning rate PEFT's `create_loraplus_optimizer` gives each parameter. Writes `lora_plus.json` beside this file.

    python lora_plus.py
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.other = torch.nn.Embedding(5, 4)
        self.first = torch.nn.Linear(4, 6)
        self.conv = torch.nn.Conv1d(4, 3, 2)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 2)


def main():
    rates = {"lr": 0.125, "ratio": 4.0, "parameters": {}}
    config = LoraConfig(
        r=2,
        target_modules=["embed", "first", "conv"],
        modules_to_save=["norm", "head"],
        trainable_token_indices={"other": [1, 3]},
        use_dora=True,
        init_lora_weights=False,
    )
    model = get_peft_model(Net(), config)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=rates["lr"], loraplus_lr_ratio=rates["ratio"]
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("base_model.model.")
            rates["parameters"][name] = group["lr"]
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(rates, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
