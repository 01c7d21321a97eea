"""Tokens a second of reading prompts and of writing greedily in transformers on the CPU: the peer of `vrtrain bench generate`.

    python scripts/peer_generate.py MODEL [--dtype float32|bfloat16] [--batch N] [--prompt-tokens N] [--new-tokens N]
"""
import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--prompt-tokens", type=int, default=64)
parser.add_argument("--new-tokens", type=int, default=64)
parser.add_argument("--rounds", type=int, default=3)
arguments = parser.parse_args()

torch.manual_seed(1)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
prompts = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.prompt_tokens))


def seconds(new_tokens):
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new_tokens,
                       min_new_tokens=new_tokens, pad_token_id=0)
    return time.perf_counter() - start


seconds(2)
first = statistics.median(seconds(1) for _ in range(arguments.rounds))
whole = statistics.median(seconds(1 + arguments.new_tokens) for _ in range(arguments.rounds))
print(json.dumps({"dtype": arguments.dtype, "batch": arguments.batch,
                  "prompt_tokens_per_s": arguments.batch * arguments.prompt_tokens / first,
                  "new_tokens_per_s": arguments.batch * arguments.new_tokens / (whole - first)}))
