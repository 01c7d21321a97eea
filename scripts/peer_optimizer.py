"""PyTorch's fused AdamW and clip_grad_norm_ on GPT-2 124M's parameters: the peer of `vrtrain bench optimizer`.

usage: peer_optimizer.py [THREADS] [STEPS] [DEVICE]      prints one JSON object. Needs torch (pip install torch numpy).
DEVICE is cpu (default) or cuda; on a card each time ends when the card has finished.
"""
import json
import sys
import time

import torch

threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 11
device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
torch.set_num_threads(threads)
WIDTH = 768
block = [(WIDTH,), (WIDTH,), (WIDTH, 3 * WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,),
         (WIDTH,), (WIDTH,), (WIDTH, 4 * WIDTH), (4 * WIDTH,), (4 * WIDTH, WIDTH), (WIDTH,)]
shapes = [(50257, WIDTH), (1024, WIDTH)] + 12 * block + [(WIDTH,), (WIDTH,)]
parameters = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
for parameter in parameters:
    parameter.grad = torch.randn_like(parameter) * 1e-3
optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def median(work):
    work(), work()
    seconds = []
    for _ in range(steps):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


step_s = median(optimizer.step)
# A limit above the norm: the norm is taken and the gradients are multiplied by one, as in a step that is not clipped.
clip_s = median(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9))
print(json.dumps({"torch": torch.__version__, "parameters": sum(p.numel() for p in parameters), "threads": threads,
                  "device": device,
                  "adamw_ms": 1e3 * step_s, "clip_ms": 1e3 * clip_s, "total_ms": 1e3 * (step_s + clip_s)}))
