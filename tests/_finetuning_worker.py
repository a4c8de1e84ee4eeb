"""A program that tests/test_finetuning.py runs in two processes: methods that leave some parameters out of a step."""

import os
import sys

import torch
from test_finetuning import FAST, _double, state, vit

from vitcourse.finetuning import finetune
from vitcourse.train import fit

if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for method in ("staged", "lora"):
        model = vit().double()
        task = finetune(model, method)
        fit(model, _double(), None, FAST, task=task, progress=False)
        found[method] = state(model)
    if os.environ["RANK"] == "0":
        torch.save(found, sys.argv[1])
