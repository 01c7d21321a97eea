"""bf16 beside f32: losses of the same seeds, and their differences next to the noise between seeds.

usage: plot_precision.py OUT.png --f32 RUN... --bf16 RUN...      needs matplotlib (pip install matplotlib)
The runs of both kinds are given in the same order of seeds, at least two of f32. Numbers go to stdout.
"""
import argparse
import json
import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--f32", nargs="+", required=True)
parser.add_argument("--bf16", nargs="+", required=True)
options = parser.parse_args()


def read(run):
    with open(os.path.join(run, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def smooth(values, width=10):
    """The mean of each value and the ones before it, at most `width`."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


runs = {"f32": [read(run) for run in options.f32], "bf16": [read(run) for run in options.bf16]}
figure, (losses, differences) = plt.subplots(1, 2, figsize=(11, 4))
for kind, colour in (("f32", "#0072B2"), ("bf16", "#D55E00")):
    for index, records in enumerate(runs[kind]):
        steps, values = [r["step"] for r in records], smooth([r["loss"] for r in records])
        style = "-" if kind == "f32" else "--"
        losses.plot(steps, values, style, color=colour, linewidth=1, alpha=0.8, label=kind if index == 0 else None)

validation = {kind: [{r["step"]: r["val_loss"] for r in run if "val_loss" in r} for run in runs[kind]] for kind in runs}
steps = sorted(validation["f32"][0])
noise = [statistics.stdev(run[step] for run in validation["f32"]) for step in steps]
differences.fill_between(steps, [-n for n in noise], noise, color="#0072B2", alpha=0.2, label="spread of f32's seeds")
for index, (exact, rounded) in enumerate(zip(validation["f32"], validation["bf16"])):
    difference = [rounded[step] - exact[step] for step in steps]
    differences.plot(steps, difference, "o-", color="#D55E00", markersize=3, linewidth=1, alpha=0.8,
                     label="bf16 - f32, same seed" if index == 0 else None)
    print(f"{os.path.basename(options.bf16[index])}: last validation {rounded[steps[-1]]:.4f}, "
          f"f32 {exact[steps[-1]]:.4f}, difference {difference[-1]:+.4f}")
print(f"standard deviation of f32's seeds at the last step: {noise[-1]:.4f}")
losses.set(xlabel="step", ylabel="loss, nats a token", title="Training loss (mean of ten steps)")
differences.set(xlabel="step", ylabel="nats a token", title="Validation loss")
for axes in (losses, differences):
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
figure.tight_layout()
figure.savefig(options.out, dpi=110)
