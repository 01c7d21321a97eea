"""vrtrain and transformers generating with the same model on this machine, in turn, and the ratio of their medians.

    python scripts/compare_generate.py target/release/vrtrain MODEL [--rounds N] [--batches 1,16] [--dtypes f32,bf16]
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("model")
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--batches", default="1,16")
parser.add_argument("--dtypes", default="f32,bf16")
parser.add_argument("--prompt-tokens", default="64")
parser.add_argument("--new-tokens", default="64")
arguments = parser.parse_args()
PEER = pathlib.Path(__file__).with_name("peer_generate.py")
LONG = {"f32": "float32", "bf16": "bfloat16"}


def measure(command):
    lengths = ["--prompt-tokens", arguments.prompt_tokens, "--new-tokens", arguments.new_tokens, "--rounds", "1"]
    output = subprocess.run(command + lengths, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


for batch in arguments.batches.split(","):
    for dtype in arguments.dtypes.split(","):
        results = {"vrtrain": [], "transformers": []}
        for _ in range(arguments.rounds):
            common = ["--batch", batch]
            results["vrtrain"].append(measure([arguments.binary, "bench", "generate", arguments.model, "--dtype", dtype,
                                               "--json"] + common))
            results["transformers"].append(measure([sys.executable, str(PEER), arguments.model, "--dtype", LONG[dtype]]
                                                   + common))
        medians = {name: {key: statistics.median(run[key] for run in runs)
                          for key in ("prompt_tokens_per_s", "new_tokens_per_s")} for name, runs in results.items()}
        for key in ("prompt_tokens_per_s", "new_tokens_per_s"):
            ours, theirs = medians["vrtrain"][key], medians["transformers"][key]
            print(f"{dtype}, batch {batch}, {key}: vrtrain {ours:.1f}, transformers {theirs:.1f}, ratio {ours / theirs:.2f}",
                  flush=True)
