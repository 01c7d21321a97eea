"""One training step in PyTorch, timed: the peer of `vrtrain bench train`.

usage: peer_train.py [--layers 12 --width 768 --heads 12 --rows 4 --time 256] [--precision f32|medium|bf16]
                     [--compile] [--pad-head] [--threads 2] [--steps 5] [--model FOLDER]
                     [--device cpu|cuda]
precision: f32 is PyTorch's default; medium is f32 with set_float32_matmul_precision("medium"), whose products run in
oneDNN (on a card, in TF32); bf16 is autocast with f32 master weights. --pad-head pads the vocabulary to 50304. Prints one JSON object.
The model is a GPT-2, or the one of FOLDER (or of a hub id) as transformers loads it.
Needs torch (pip install torch numpy), for --model transformers as well.
"""
import argparse
import contextlib
import json
import math
import resource
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
for name, default in [("layers", 12), ("width", 768), ("heads", 12), ("rows", 4), ("time", 256), ("threads", 2), ("steps", 5)]:
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--precision", choices=["f32", "medium", "bf16"], default="f32")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--pad-head", action="store_true")
parser.add_argument("--model", help="a model that transformers loads, in place of a GPT-2 of the given shape")
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
options = parser.parse_args()
WIDTH, HEADS, LAYERS = options.width, options.heads, options.layers
VOCABULARY = 50304 if options.pad_head else 50257

torch.set_num_threads(options.threads)
torch.manual_seed(0)
if options.precision == "medium":
    torch.set_float32_matmul_precision("medium")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        rows, length, width = x.shape
        split = (part.view(rows, length, HEADS, width // HEADS).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(*split, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(rows, length, width))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(max(1024, options.time), WIDTH)
        self.h, self.ln_f = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0, 0.02 / math.sqrt(2 * LAYERS) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class Pretrained(nn.Module):
    """A model of transformers in f32, trained as their Trainer does: logits and cross-entropy of the shifted tokens."""

    def __init__(self, name):
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).train()

    def forward(self, ids, targets):
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


model = (Pretrained(options.model) if options.model else Gpt2()).to(options.device)
decayed = [p for p in model.parameters() if p.dim() >= 2]
plain = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
    lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=True,
)
run = torch.compile(model) if options.compile else model
autocast = (lambda: torch.autocast(options.device, dtype=torch.bfloat16)) if options.precision == "bf16" else contextlib.nullcontext
ids = torch.randint(0, model.model.config.vocab_size if options.model else 50257, (options.rows, options.time + 1)).to(options.device)
inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def step():
    with autocast():
        loss = run(inputs, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if options.device == "cuda":
        torch.cuda.synchronize()


for _ in range(2):
    step()
seconds = []
for _ in range(options.steps):
    started = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - started)
median = sorted(seconds)[len(seconds) // 2]
print(json.dumps({
    "torch": torch.__version__, "precision": options.precision, "compile": options.compile,
    "step_ms": 1e3 * median, "tokens_per_s": options.rows * options.time / median,
    "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}))
