"""Losses and gates of runs as one picture: the plots of the README.

usage: plot.py OUT.png [--level NAME=VALUE]... RUN...      needs matplotlib (pip install matplotlib)
A run is a run folder; its line is named after the folder. --level draws a dotted line across the losses.
"""
import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("runs", nargs="+")
parser.add_argument("--level", action="append", default=[])
options = parser.parse_args()

# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
figure, (losses, gates) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[2, 1])
STYLES = ["-", "--", "-."]
if len(options.runs) > len(COLOURS) * len(STYLES):
    parser.error(f"{len(options.runs)} runs, of which {len(COLOURS) * len(STYLES)} can be told apart")
for place, run in enumerate(options.runs):
    colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS)]
    with open(os.path.join(run, "metrics.jsonl")) as file:
        records = [json.loads(line) for line in file]
    name = os.path.basename(os.path.normpath(run))
    steps = [r["step"] for r in records]
    losses.plot(steps, [r["loss"] for r in records], color=colour, alpha=0.25, linewidth=0.8)
    validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    losses.plot(*zip(*validation), color=colour, linestyle=style, marker="o", markersize=3,
                label=f"{name}, validation {validation[-1][1]:.3f}")
    gates.plot(steps, [r["gate"] for r in records], color=colour, linestyle=style, linewidth=0.9, label=name)
for level in options.level:
    label, value = level.split("=")
    losses.axhline(float(value), color="black", linestyle=":", linewidth=1, label=f"{label} {float(value):.2f}")
losses.set(xlabel="step", ylabel="loss, nats a token", title="Loss (pale: training)")
gates.set(xlabel="step", title="Gate: eta / scheduled rate", ylim=(0, 1.05))
for axes in (losses, gates):
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
figure.tight_layout()
figure.savefig(options.out, dpi=110)
print(options.out)
