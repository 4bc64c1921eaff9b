"""Writes the JSON beside it: losses, gradients and metrics of TRL's own trainers, on small random batches.

Each loss is a method of a trainer, called on an object that has only the fields that the method reads, in f64. Needs trl 1.16.0 and
torch; PPO was removed from TRL, so `ppo.py` reads trl 1.10.0 and 0.11.4 from the directories in TRL_1_10 and TRL_0_11
(`pip install --no-deps --target DIR trl==1.10.0`). Run: `TRL_1_10=DIR TRL_0_11=DIR python generate.py`. The tests are in
tests/align/objective.
"""

import torch
import trl

import policy
import ppo
import preference
import unpaired

versions = {"trl": trl.__version__, "torch": torch.__version__.split("+")[0]}
preference.run(versions)
unpaired.run(versions)
policy.run(versions)
ppo.run({**versions, "trl (whitening)": "1.10.0", "trl (PPO)": "0.11.4"})
