"""The laboratory's tasks in PyTorch on the CPU beside vrtrain, in turn: milliseconds of a training step, and the ratio.

Run: python scripts/peer_lab.py VRTRAIN --cifar TRAIN.bin TEST.bin [--rounds 2] [--tasks resnet32,cnn,transformer,gridworld]

Each round times PyTorch (eager and channels-last, whichever is faster) and then vrtrain; medians over the steps after
the first two, then the least round of each side.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


def resnet32():
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(5):
            layers.append(Block(inputs, outputs, outputs // inputs))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def cnn():
    layers = []
    for inputs, outputs in [(3, 64), (64, 128), (128, 256)]:
        for first in (inputs, outputs):
            layers += [nn.Conv2d(first, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 512), nn.ReLU(), nn.Linear(512, 10))


class Transformer(nn.Module):
    """GPT-2's block at the paper's sizes."""

    def __init__(self, vocabulary):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, 128), nn.Embedding(64, 128)
        block = lambda: nn.TransformerEncoderLayer(128, 8, 256, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks, self.norm = nn.ModuleList([block(), block()]), nn.LayerNorm(128)
        self.mask = nn.Transformer.generate_square_subsequent_mask(64)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.norm(x) @ self.tokens.weight.T


def timed(step, steps):
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def peer(task, steps, vocabulary):
    torch.manual_seed(0)
    if task in ("resnet32", "cnn"):
        best = float("inf")
        for layout in (torch.contiguous_format, torch.channels_last):
            model = (resnet32() if task == "resnet32" else cnn()).to(memory_format=layout)
            images = torch.randn(128, 3, 32, 32).to(memory_format=layout)
            labels = torch.randint(0, 10, (128,))
            best = min(best, timed(make(model, lambda: F.cross_entropy(model(images), labels)), steps))
        return best
    if task == "transformer":
        model = Transformer(vocabulary)
        ids = torch.randint(0, vocabulary, (32, 65))
        loss = lambda: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        return timed(make(model, loss), steps)
    # GridWorld: all 64 states through the network, flows in and out as products with 0/1 matrices.
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))
    states, into, out = torch.randn(64, 16), (torch.rand(64, 192) < 0.02).float(), (torch.rand(64, 192) < 0.02).float()
    weights, rewards = torch.rand(64), torch.rand(64)

    def loss():
        flows = model(states)
        exp = flows.exp().flatten()
        inner = ((into @ exp + 1e-8).log() - (out @ exp + 1e-8).log()).square() * weights
        return (inner.sum() + (flows[:, 2] - rewards).square().sum()) / 128

    return timed(make(model, loss), 20 * steps)


def make(model, loss):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def ours(binary, task, steps, files, folder, vocabulary_text):
    sets = [f"train.steps={steps}", "train.eval_every=0", "optimizer.name=adamw", "optimizer.lr=1e-3"]
    if task in ("resnet32", "cnn"):
        train, test = files
        text = (ROOT / "configs" / "lab" / f"cifar10-{task}.toml").read_text()
        lines = [line for line in text.splitlines() if not line.startswith(("files =", "validation =", "source ="))]
        config = "\n".join(lines).replace("[data]", f'[data]\nsource = "{train}"\nvalidation = {{ source = "{test}" }}')
        command = ["lab", "train"]
    elif task == "gridworld":
        config, command = (ROOT / "configs" / "lab" / "gridworld.toml").read_text(), ["lab", "train"]
    else:
        text = (ROOT / "configs" / "lab" / "wikitext2.toml").read_text()
        lines = [line for line in text.splitlines() if not line.startswith(("files =", "validation =", "source ="))]
        config = "\n".join(lines).replace("[data]", f'[data]\nsource = "{vocabulary_text[0]}"').replace(
            "[tokenizer]", f'[tokenizer]\nsource = "{vocabulary_text[1]}"')
        command, sets = ["pretrain"], sets + ["train.dtype=f32"]
    path = folder / f"{task}.toml"
    path.write_text(config)
    run = folder / f"{task}-{time.time_ns()}"
    arguments = [binary, *command, "--config", str(path), "--run-dir", str(run), "--quiet"]
    for assignment in sets:
        arguments += ["--set", assignment]
    subprocess.run(arguments, check=True)
    times = [json.loads(line)["step_ms"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(times[2:])


parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("--cifar", nargs=2, default=(None, None))
parser.add_argument("--text", nargs=2, metavar=("TEXT", "TOKENIZER"), help="for the transformer")
parser.add_argument("--vocabulary", type=int, default=4096)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--tasks", default="resnet32,cnn,transformer,gridworld")
args = parser.parse_args()
torch.set_num_threads(args.threads)
with tempfile.TemporaryDirectory() as folder:
    for task in args.tasks.split(","):
        pairs = []
        for _ in range(args.rounds):
            theirs = peer(task, args.steps, args.vocabulary)
            steps = args.steps * (20 if task == "gridworld" else 1)
            pairs.append((theirs, ours(args.binary, task, steps, args.cifar, pathlib.Path(folder), args.text)))
        theirs, own = (min(side) for side in zip(*pairs))
        print(f"{task}: PyTorch {theirs:.2f} ms, vrtrain {own:.2f} ms, ratio {own / theirs:.2f}", flush=True)
