"""vrtrain beside PyTorch on this machine, in turn, and the ratio of their medians.

usage: compare_train.py VRTRAIN_BINARY [--rounds 3] [--shapes 124m-256,124m-1024,6x384] [--peers eager,compiled,tuned,...]
                        [--model FOLDER]
A peer is compared with vrtrain in the same precision. --model FOLDER takes a model that transformers loads (4 x 512 tokens,
or --rows and --time) in place of the GPT-2 shapes.
Peers: eager (f32 as its users run it), compiled (the same under torch.compile), medium (f32 through oneDNN, compiled),
tuned (medium with an allocator that never returns memory), bf16 (autocast, compiled), bf16-tuned (with the allocator
and a padded head). Run it with the interpreter that has torch; build vrtrain with `cargo build --release` first.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPES = {"124m-256": (12, 768, 12, 4, 256), "124m-1024": (12, 768, 12, 2, 1024), "6x384": (6, 384, 6, 8, 256)}
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
PEERS = {
    "eager": (["--precision", "f32"], {}),
    "compiled": (["--precision", "f32", "--compile"], {}),
    "medium": (["--precision", "medium", "--compile"], {}),
    "tuned": (["--precision", "medium", "--compile"], ALLOCATOR),
    "bf16": (["--precision", "bf16", "--compile"], {}),
    "bf16-tuned": (["--precision", "bf16", "--compile", "--pad-head"], ALLOCATOR),
}

parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--shapes", default="124m-256")
parser.add_argument("--peers", default="eager")
parser.add_argument("--ours", default="f32", help="precisions of vrtrain: f32, bf16, or both with a comma")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--model", help="a model's folder, in place of the shapes")
parser.add_argument("--rows", type=int, default=4)
parser.add_argument("--time", type=int, default=512)
options = parser.parse_args()


def run(command, extra):
    # Some machines force an old BLAS kernel on every program; a peer is measured without that.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")} | extra
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    if output.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output.stderr}")
    return json.loads(output.stdout.strip().splitlines()[-1])


def described(shape, names):
    """The flags of a shape, or of the model in its place, under the names that one side has for them."""
    if options.model:
        values = {"model": options.model, "rows": options.rows, "time": options.time}
    else:
        values = dict(zip(("layers", "width", "heads", "rows", "time"), SHAPES[shape]))
    return [word for key, value in values.items() for word in (f"--{names.get(key, key)}", str(value))]


OUR_NAMES = {"model": "init", "layers": "n-layer", "width": "n-embd", "heads": "n-head", "rows": "micro-batch",
             "time": "sequence-length"}


def ours(shape, precision):
    command = [options.binary, "bench", "train", "--json", "--steps", str(options.steps), "--dtype", precision]
    return run(command + described(shape, OUR_NAMES), {"RAYON_NUM_THREADS": str(options.threads)})


def peer(shape, name):
    arguments, extra = PEERS[name]
    command = [sys.executable, os.path.join(HERE, "peer_train.py"), "--steps", str(options.steps)]
    return run(command + described(shape, {}) + ["--threads", str(options.threads)] + arguments, extra)


for shape in [options.model] if options.model else options.shapes.split(","):
    runs = {}
    for _ in range(options.rounds):
        for precision in options.ours.split(","):
            runs.setdefault(f"vrtrain {precision}", []).append(ours(shape, precision))
        for name in options.peers.split(","):
            runs.setdefault(f"PyTorch {name}", []).append(peer(shape, name))
    speed = {name: statistics.median(r["tokens_per_s"] for r in results) for name, results in runs.items()}
    memory = {name: max(r["peak_memory_bytes"] for r in results) for name, results in runs.items()}
    print(f"{shape}: medians of {options.rounds} alternated rounds, {options.threads} threads")
    for name in runs:
        line = f"  {name:<22} {speed[name]:8.0f} tok/s  {memory[name] / 2**30:5.2f} GiB"
        if not name.startswith("vrtrain"):
            same = "vrtrain bf16" if "bf16" in name else "vrtrain f32"
            if same in runs:
                line += f"   {same}: {speed[same] / speed[name]:.2f}x the speed, {memory[same] / memory[name]:.2f}x the memory"
        print(line)
