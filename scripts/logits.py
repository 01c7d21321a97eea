"""Logits of a model folder in transformers, for comparison with vrtrain's.

usage: logits.py MODEL_FOLDER ID,ID,... OUT      writes [time, vocabulary] f32 (little endian) to OUT
Needs torch and transformers (pip install torch transformers).
"""
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, ids, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokens = torch.tensor([[int(i) for i in ids.split(",")]])
with torch.no_grad():
    logits = model(tokens).logits[0]
logits.numpy().astype("<f4").tofile(out)

text = None
try:
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(folder).decode(tokens[0])
except Exception as error:  # a model without a tokenizer has none to load
    text = f"(no tokenizer: {type(error).__name__})"
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters, {text!r}")
