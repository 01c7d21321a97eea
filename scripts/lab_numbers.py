"""Writes tests/fixtures/lab/pytorch.json: what PyTorch computes for the laboratory, in float64.

Run: python scripts/lab_numbers.py   (PyTorch, transformers; CPU; about a minute)

Convolution and batch norm; the first step of ResNet-32 and of the CNN (loss, and of every gradient its length and its
product with a probe); the largest eigenvalues of the Hessian of a small GPT-2, by Lanczos' method on exact
Hessian-vector products (two backward passes). Numbers that both sides need are sines, rounded to float32.
"""

import json
import math
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

torch.set_default_dtype(torch.float64)
ROOT = pathlib.Path(__file__).resolve().parent.parent


def sines(count, phase, scale=1.0, offset=0.0):
    return (offset + scale * torch.sin(1.7 * torch.arange(count) + phase)).float().double()


def leaf(shape, phase, **more):
    return sines(math.prod(shape), phase, **more).reshape(shape).requires_grad_()


def flat(tensor):
    return tensor.detach().flatten().tolist()


def to_last(x):
    """Channels first to channels last: [B, C, H, W] -> [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def to_first(x):
    return x.permute(0, 3, 1, 2)


def convolution():
    x, weight, bias = leaf((2, 6, 5, 3), 0.1), leaf((4, 3, 3, 3), 0.2), leaf((4,), 0.3)
    y = to_last(F.conv2d(to_first(x), to_first(weight), bias, stride=2, padding=1))
    (y * sines(y.numel(), 0.4).reshape(y.shape)).sum().backward()
    return {"y": flat(y), "dx": flat(x.grad), "dweight": flat(weight.grad), "dbias": flat(bias.grad)}


def batch_norm():
    x, weight, bias = leaf((2, 4, 4, 3), 0.1, scale=2.0, offset=1.0), leaf((3,), 0.2), leaf((3,), 0.3)
    residual = leaf((2, 4, 4, 3), 0.5)
    mean, variance = torch.zeros(3), torch.ones(3)
    y = F.batch_norm(to_first(x), mean, variance, weight, bias, training=True, momentum=0.1, eps=1e-5)
    y = F.relu(to_last(y) + residual)
    (y * sines(y.numel(), 0.4).reshape(y.shape)).sum().backward()
    numbers = {"y": y, "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad, "dresidual": residual.grad}
    return {name: flat(value) for name, value in (numbers | {"mean": mean, "variance": variance}).items()}


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet32(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stage = lambda i, o: nn.Sequential(*(Block(i if n == 0 else o, o, 1 if n or i == o else 2) for n in range(5)))
        self.layer1, self.layer2, self.layer3 = stage(16, 16), stage(16, 32), stage(32, 64)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs in [(3, 64), (64, 128), (128, 256)]:
            for first in (inputs, outputs):
                layers += [nn.Conv2d(first, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(4096, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def set_numbers(model):
    """Sines as weights, in the order of the names and, for convolutions, [O, k, k, I]."""
    for index, (name, value) in enumerate(sorted(model.named_parameters())):
        if value.dim() >= 2:
            fan_in = value[0].numel()
            numbers = sines(value.numel(), 0.1 * index, scale=2.0 / math.sqrt(fan_in))
            if value.dim() == 4:
                o, i, k, _ = value.shape
                numbers = to_first(numbers.reshape(o, k, k, i))
        else:
            one = name.endswith("weight")
            numbers = sines(value.numel(), 0.1 * index, scale=0.1, offset=1.0 if one else 0.0)
        value.data.copy_(numbers.reshape(value.shape))


def first_step(model, batch=4):
    set_numbers(model)
    images = to_first(sines(batch * 3072, 0.7).reshape(batch, 32, 32, 3))
    loss = F.cross_entropy(model(images), torch.tensor([3, 8, 0, 5][:batch]))
    loss.backward()
    gradients = {}
    for name, value in model.named_parameters():
        gradient = to_last(value.grad) if value.dim() == 4 else value.grad
        gradient = gradient.flatten()
        gradients[name] = [gradient.norm().item(), gradient.dot(sines(gradient.numel(), 0.9)).item()]
    return {"parameters": sum(p.numel() for p in model.parameters()), "loss": loss.item(), "gradients": gradients}


def gpt2_sharpness(folder, rows=4, iterations=60):
    """The mean loss on the first rows of T+1 tokens, as `vrtrain sharpness` takes them."""
    import tomllib

    import numpy

    run = tomllib.loads((folder / "run.toml").read_text())
    config = GPT2Config(**json.loads((folder / "config.json").read_text()), attn_implementation="eager")
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0
    model = GPT2LMHeadModel(config).double()
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict({f"transformer.{k}": v.double() for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    length = run["train"]["sequence_length"]
    tokens = torch.from_numpy(numpy.fromfile(folder / "tokens.bin", dtype="<u2").astype("int64"))
    rows = tokens[: rows * length + 1]
    inputs, targets = rows[:-1].reshape(-1, length), rows[1:].reshape(-1, length)
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])

    def product(v):
        parts = torch.autograd.grad(gradient @ v, parameters, retain_graph=True)
        return torch.cat([p.flatten() for p in parts])

    torch.manual_seed(0)
    basis, alpha, beta = [], [], []
    v = torch.randn(gradient.numel())
    v /= v.norm()
    for _ in range(iterations):
        w = product(v)
        basis.append(v)
        alpha.append((v @ w).item())
        for _ in range(2):
            for b in basis:
                w = w - (b @ w) * b
        beta.append(w.norm().item())
        v = w / w.norm()
    values = torch.linalg.eigvalsh(torch.diag(torch.tensor(alpha)) + torch.diag(torch.tensor(beta[:-1]), 1) + torch.diag(torch.tensor(beta[:-1]), -1))
    return {"loss": loss.item(), "parameters": gradient.numel(), "largest": values.flip(0)[:3].tolist()}


numbers = {
    "versions": {"torch": torch.__version__},
    "convolution": convolution(),
    "batch_norm": batch_norm(),
    "resnet32": first_step(ResNet32()),
    "cnn": first_step(Cnn()),
    "gpt2_sharpness": gpt2_sharpness(ROOT / "tests" / "fixtures" / "train" / "vradam-accumulated"),
}
out = ROOT / "tests" / "fixtures" / "lab" / "pytorch.json"
out.parent.mkdir(exist_ok=True)
out.write_text(json.dumps(numbers) + "\n")
print(out, out.stat().st_size, "bytes;", {k: v for k, v in numbers["gpt2_sharpness"].items()}, numbers["resnet32"]["parameters"], numbers["cnn"]["parameters"])
