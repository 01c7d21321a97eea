"""Hands runs of vrtrain to Weights & Biases with their own client, offline by default.

Usage: wandb_sync.py RUN... [--project NAME] [--online]

Every number of metrics.jsonl and telemetry.jsonl becomes a value of its step, the resolved config the run's config. Offline,
`wandb sync wandb/offline-run-*` uploads what this writes. Hand a run over once it has ended: a second time would send its
steps again. Needs wandb (pip).
"""
import argparse
import hashlib
import json
import tomllib
from pathlib import Path

import wandb


def lines(path):
    """The whole lines of a file that a trainer may be writing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def hand_over(folder, project, mode):
    telemetry = {line["step"]: line for line in lines(folder / "telemetry.jsonl")}
    config = tomllib.loads((folder / "config.toml").read_text())
    # The same run keeps its id, wherever this is called from.
    name = folder.resolve()
    identity = hashlib.sha256(str(name).encode()).hexdigest()[:12]
    with wandb.init(project=project, name=name.name, id=identity, resume="allow", mode=mode, config=config) as run:
        for record in lines(folder / "metrics.jsonl"):
            step = record["step"]
            values = {**telemetry.get(step, {}), **record}
            del values["step"]
            run.log(values, step=step)


parser = argparse.ArgumentParser()
parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
parser.add_argument("--project", default="vrtrain")
parser.add_argument("--online", action="store_true")
arguments = parser.parse_args()
for folder in arguments.runs:
    hand_over(folder, arguments.project, "online" if arguments.online else "offline")
