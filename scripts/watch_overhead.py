#!/usr/bin/env python3
"""What an open live page costs a run: watch_overhead.py VRTRAIN [--steps N] [--window SECONDS]

Trains the quickstart's model once. In every other window a `vrtrain watch` with a reader on its event stream is open,
beginning with all that the run has written so far, as when a browser opens the page. Prints the median step of either kind of
window, the median of the ratios of neighbouring windows with its standard error, and the processor time that watch took.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.parse


def drain(url):
    """Reads the event stream to its end, as a page does."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc)
    try:
        connection.request("GET", "/events")
        reply = connection.getresponse()
        while reply.read1(65536):
            pass
    except (OSError, http.client.HTTPException):
        pass  # the server is ended at the end of a window


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("vrtrain")
    flags.add_argument("--steps", type=int, default=2800)
    flags.add_argument("--window", type=float, default=4.0)
    options = flags.parse_args()
    tick = os.sysconf("SC_CLK_TCK")
    with tempfile.TemporaryDirectory() as folder:
        run = os.path.join(folder, "run")
        trainer = subprocess.Popen(
            [options.vrtrain, "pretrain", "--quiet", "--set", f"train.steps={options.steps}", "--set", "train.eval_every=0",
             "--run-dir", run], stdout=subprocess.DEVNULL)
        while trainer.poll() is None and not os.path.exists(os.path.join(run, "metrics.jsonl")):
            time.sleep(0.1)
        windows, processor = [], 0.0
        while trainer.poll() is None:
            begin = time.time()
            watching = len(windows) % 2 == 1
            if watching:
                watch = subprocess.Popen([options.vrtrain, "watch", run, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                threading.Thread(target=drain, args=(watch.stdout.readline().strip(),), daemon=True).start()
            time.sleep(options.window)
            windows.append((watching, begin, time.time()))
            if watching:
                fields = open(f"/proc/{watch.pid}/stat").read().rsplit(")", 1)[1].split()
                processor += (int(fields[11]) + int(fields[12])) / tick
                watch.terminate()
                watch.wait()
        steps = {}
        for line in open(os.path.join(run, "metrics.jsonl")):
            record = json.loads(line)
            steps[record["step"]] = record["step_ms"]
        times = [(record["time"], steps.get(record["step"])) for record in map(json.loads, open(os.path.join(run, "telemetry.jsonl")))]
    medians = []
    for watching, begin, end in windows:
        inside = [ms for at, ms in times if begin < at < end and ms is not None]
        if len(inside) > 10:
            medians.append((watching, statistics.mean(inside)))
    ratios = [b[1] / ((a[1] + c[1]) / 2) for a, b, c in zip(medians, medians[1:], medians[2:]) if b[0] and not a[0] and not c[0]]
    of = {kind: statistics.median(ms for watching, ms in medians if watching == kind) for kind in (False, True)}
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(f"mean step, median over windows of {options.window:g} s: {of[False]:.2f} ms without, {of[True]:.2f} ms with watch")
    print(f"with / neighbours without: median {statistics.median(ratios):.4f}, mean {statistics.mean(ratios):.4f} +- {error:.4f} ({len(ratios)} windows)")
    open_for = sum(end - begin for watching, begin, end in windows if watching)
    print(f"processor time of watch: {processor:.2f} s in {open_for:.0f} s ({100 * processor / open_for:.2f}% of one core)")


if __name__ == "__main__":
    main()
