#!/usr/bin/env python3
"""Plants bugs in the kernels, one at a time, and asks whether the kernel test notices each.

    mutations.py OUT [NAME_PART ...]

OUT is a folder in which kernels/check.sh has run. A bug is caught when steps.cpp fails or gives other bits in another
schedule: plain, else under ThreadSanitizer, else under AddressSanitizer. Exit status 1 when one is caught by none.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
KERNELS = HERE.parent.parent / "kernels"
COMPILE = ["g++", "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]

# (what is wrong, file, right text, wrong text)
BUGS = [
    ("no barrier after the warps' sums", "flat.cuh",
     "of_warp[warp] = x;\n  __syncthreads();", "of_warp[warp] = x;"),
    ("no barrier before the warps' sums are used again", "flat.cuh",
     "  __syncthreads();  // of_warp is free", "  // of_warp is free"),
    ("every lane writes its warp's sum", "flat.cuh", "if (lane == 0) of_warp[warp] = x;", "of_warp[warp] = x;"),
    ("a warp's fold begins at 8 lanes", "flat.cuh", "int offset = 16", "int offset = 8"),
    ("a warp too many is read", "flat.cuh", "lane < warps ?", "lane <= warps ?"),
    ("a barrier inside a branch", "flat.cuh", "  __syncthreads();  // of_warp is free", "  if (warp == 0) __syncthreads();  //"),
    ("a whole-warp shuffle in half a warp", "flat.cuh", "  if (warp == 0)\n    for", "  if (threadIdx.x < warps)\n    for"),
    ("early return before the block's sum", "flat.cuh",
     "  double squares = 0.0;\n  for", "  double squares = 0.0;\n  if (chunk.begin + 4 * threadIdx.x >= chunk.end) return;\n  for"),
    ("a chunk runs on past its group", "flat.cuh",
     "begin + extent.chunk < last ? begin + extent.chunk : last", "begin + extent.chunk"),
    ("a float4 read across the end", "flat.cuh", "if (i + 4 <= end) return *reinterpret", "if (i < end) return *reinterpret"),
    ("a float4 written across the end", "flat.cuh", "  if (i + 4 <= end) {\n", "  if (i < end) {\n"),
    ("threads' elements overlap", "flat.cuh", "i < chunk.end; i += 4 * blockDim.x) {\n    const float4 gradient",
     "i < chunk.end; i += 4 * blockDim.x - 4) {\n    const float4 gradient"),
    ("all blocks write the first partial", "flat.cuh",
     "if (threadIdx.x == 0) partials[blockIdx.x] = squares;", "if (threadIdx.x == 0) partials[0] = squares;"),
    ("two threads write the partial", "flat.cuh", "  squares = block_sum(squares);\n  if (threadIdx.x == 0)",
     "  squares = block_sum(squares);\n  __shared__ double s; if (threadIdx.x == 0) s = squares; __syncthreads(); squares = s;\n"
     "  if (threadIdx.x < 2)"),
    ("a block reads its neighbour's partial", "flat.cuh", "  squares = block_sum(squares);",
     "  if (blockIdx.x && partials[blockIdx.x - 1] == 1.5) squares += 1.0;\n  squares = block_sum(squares);"),
    ("the fold ends one chunk early", "flat.cuh", "i < count; i += blockDim.x) sum", "i + 1 < count; i += blockDim.x) sum"),
    ("decay reaches the plain group", "flat.cuh", "group == 0 ? (float)(scalars->eta", "group < 2 ? (float)(scalars->eta"),
    ("decay with the rate before the gate", "flat.cuh", "(float)(scalars->eta[group] * rates.weight_decay)",
     "(float)(scalars->eta[group] / scalars->gate[group] * rates.weight_decay)"),
    ("bf16 cut instead of rounded", "flat.cuh", "+ 0x7fffu + (bits >> 16 & 1u)", ""),
    ("bf16 ties go up", "flat.cuh", "+ 0x7fffu + (bits >> 16 & 1u)", "+ 0x8000u"),
    ("a step on gradients that are not finite", "flat.cuh", "  if (!scalars->finite) return;\n  const Chunk", "  const Chunk"),
    ("the norm is not scaled", "vradam.cu", "decision.gradient_scale * sqrt(", "sqrt("),
    ("the clip forgets the scale", "vradam.cu", "(float)(decision.gradient_scale * clip)", "(float)clip"),
    ("the cross term's sign", "vradam.cu", "2.0 * decision.keep * take", "-2.0 * decision.keep * take"),
    ("the cross term forgets the clip", "vradam.cu", "2.0 * decision.keep * take *", "2.0 * decision.keep * decision.take *"),
    ("the gate has no floor", "vradam.cu", "fmin(decision.beta3 * q, decision.alpha1)", "decision.beta3 * q"),
    ("one group's sum for both", "vradam.cu", "first[group], chunks[group], 2);\n    velocity", "first[0], chunks[0], 2);\n    velocity"),
    ("moments swapped", "vradam.cu", "  second_moment = constants.beta2 * second_moment + constants.take2 *",
     "  second_moment = constants.beta1 * second_moment + constants.take1 *"),
    ("no bias correction of the second moment", "vradam.cu", "sqrtf(second_moment) * constants.root_scale", "sqrtf(second_moment)"),
    ("epsilon inside the root", "vradam.cu", "sqrtf(second_moment) * constants.root_scale + constants.eps",
     "sqrtf(second_moment + constants.eps) * constants.root_scale"),
    ("the finish of a refused step forgets ||v||^2", "vradam.cu",
     "  if (!scalars->finite) return;\n  const u64 decayed", "  const u64 decayed"),
    ("Lion's two betas swapped", "methods.cu", "sign(constants.beta1 * velocity", "sign(constants.beta2 * velocity"),
    ("Nesterov without its look ahead", "methods.cu", "gradient_rate * gradient + velocity_rate * velocity)", "gradient_rate * velocity)"),
    ("AdaBelief's surprise against the gradient alone", "methods.cu", "gradient - velocity;", "gradient;"),
    ("RGD's speed without the mass", "methods.cu", "sqrt(constants.rest_energy + velocity_sq)", "sqrt(1.0 + velocity_sq)"),
    ("a gap's last element left", "methods.cu", "i < end; i += blockDim.x) numbers", "i + 1 < end; i += blockDim.x) numbers"),
]
# mode: (flags, threads of a block, schedules)
MODES = {
    "plain": ([], "224", "0123"),
    "thread": (["-fsanitize=thread"], "64", "02"),
    "address": (["-fsanitize=address"], "224", "0"),
}


def build(out, mode, kernels):
    objects = [out / f"steps-{mode}.o", out / "machine.o"]
    flags = COMPILE + MODES[mode][0] + [f"-I{HERE}/machine"]
    if not objects[0].exists():
        subprocess.run(flags + [f"-I{KERNELS}", "-c", HERE / "kernels/steps.cpp", "-o", objects[0]], check=True)
    program = out / f"mutant-{mode}"
    command = flags + [f"-I{kernels}", HERE / "kernels/launch.cpp", *objects, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"a mutant does not compile:\n{done.stderr[:2000]}")
    return program


def symptom(out, mode, kernels):
    """What a run shows that the right kernels never do; None where there is nothing."""
    program, (_, threads, schedules) = build(out, mode, kernels), MODES[mode]
    bits = set()
    for schedule in schedules:
        command = [program, threads] if mode != "thread" else ["setarch", os.uname().machine, "-R", program, threads]
        environment = {**os.environ, "CUDA_CPU_ORDER": schedule}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        except subprocess.TimeoutExpired:
            return "does not end"
        if done.returncode:
            told = re.search(r"emulated device: .*|WARNING: Thread.*|ERROR: Addr[^:]*: [\w-]+|MISS.*", done.stderr + done.stdout)
            return told.group(0)[:100] if told else f"status {done.returncode}"
        bits.update(line for line in done.stdout.splitlines() if line.startswith("bits="))
    return "other bits in another schedule" if len(bits) > 1 else None


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out, wanted = Path(sys.argv[1]).resolve(), sys.argv[2:]
    for mode in MODES:
        (out / f"steps-{mode}.o").unlink(missing_ok=True)
    missed, count = [], {mode: 0 for mode in MODES}
    for name, file, right, wrong in BUGS:
        if wanted and not any(part in name for part in wanted):
            continue
        mutant = out / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(KERNELS, mutant)
        text = (mutant / file).read_text()
        if right not in text:
            sys.exit(f"mutations: {file} has no {right!r} any more (bug: {name})")
        (mutant / file).write_text(text.replace(right, wrong, 1))
        for mode in MODES:
            told = symptom(out, mode, mutant)
            if told:
                count[mode] += 1
                print(f"caught  {name}: {mode}: {told}", flush=True)
                break
        else:
            missed.append(name)
            print(f"MISSED  {name}", flush=True)
    print(f"mutations: {sum(count.values())} caught ({count}), {len(missed)} missed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
