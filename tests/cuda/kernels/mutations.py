#!/usr/bin/env python3
"""Plants bugs in the kernels, one at a time, and asks whether the kernel test notices each.

    mutations.py OUT [NAME_PART ...]

OUT is a folder in which kernels/check.sh has run. A bug is caught when its test (model.cpp for model.cu, else steps.cpp)
fails or gives other bits in another schedule: plain, else under ThreadSanitizer, else under AddressSanitizer. Exit status
1 when one is caught by none.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
KERNELS = HERE.parent.parent / "kernels"
COMPILE = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]

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
    ("a block's sum without the barrier after its warps", "model.cu",
     "of_warps[threadIdx.x / 32] = value;\n  __syncthreads();", "of_warps[threadIdx.x / 32] = value;"),
    ("a block's sum before the last one is read", "model.cu", ": warp_sum(value);\n  __syncthreads();", ": warp_sum(value);"),
    ("a block's sum leaves its last warp out", "model.cu", "const unsigned warps = blockDim.x / 32;", "const unsigned warps = blockDim.x / 33;"),
    ("a loss reads a logit that is a slope already", "model.cu", "  if (!slopes) return;\n  __syncthreads();", "  if (!slopes) return;"),
    ("logits overflow", "model.cu", "most = over_block(most, true);", "most = 0.0f;"),
    ("onehot forgotten", "model.cu", "* factor - (i == target ? 1.0f : 0.0f)", "* factor"),
    ("an ignored target counts", "model.cu", "if (target == ignore) {", "if (target == ignore && !slopes) {"),
    ("slopes that nobody asked for", "model.cu", "    if (slopes)\n      for", "    if (true)\n      for"),
    ("the query's own key left out", "model.cu", "i <= last; i += 32) {\n    if (i < first) continue;",
     "i < last; i += 32) {\n    if (i < first) continue;"),
    ("keys of the document before", "model.cu", "if (i >= first) most", "if (i >= begin) most"),
    ("lanes change keys between the loops", "model.cu", "begin = first / 32 * 32;", "begin = first;"),
    ("a head's rows read another row's positions", "model.cu", "positions[row / (heads * time) * time + last];\n  // Each",
     "positions[row / heads % time * time + last];\n  // Each"),
    ("the softmax's NaN lost", "model.cu", "    sum += scores[i];", "    sum = fmaxf(sum, sum + scores[i]);"),
    ("scores scaled after their exponent", "model.cu", "expf((scores[i] - most) * scale)", "expf(scores[i] - most) * scale"),
    ("scale of the softmax's slopes forgotten", "model.cu", ": scale * probabilities[i]", ": probabilities[i]"),
    ("a norm's lanes overlap", "model.cu", "for (u64 i = lane; i < width; i += 32) mean", "for (u64 i = lane; i < width; i += 31) mean"),
    ("a norm's row too many", "model.cu", "  if (row >= rows) return;", "  if (row > rows) return;"),
    ("a norm's residual forgotten", "model.cu", "(residual ? residual[first + i] : 0.0f)", "0.0f"),
    ("a norm's means ignored", "model.cu", "const float mean = means ? means[row] : 0.0f,", "const float mean = 0.0f,"),
    ("a chunk runs on past the rows", "model.cu", "(chunk + 1) * ROWS_A_SUM < rows ? (chunk + 1) * ROWS_A_SUM : rows",
     "(chunk + 1) * ROWS_A_SUM"),
    ("a chunk's last row left out", "model.cu", "row < end; row++) sum", "row + 1 < end; row++) sum"),
    ("a fold forgets what was there", "model.cu", "accumulate ? into[column] + (float)sum", "accumulate ? (float)sum"),
    ("a fold in f32", "model.cu", "sum += (double)sums[chunk * width + column]", "sum = (float)(sum + sums[chunk * width + column])"),
    ("a bias by row", "model.cu", "sum += bias[i % width]", "sum += bias[i / width]"),
    ("gelu's slope overflows", "model.cu", "v = v > GELU_FLAT ? GELU_FLAT : v < -GELU_FLAT ? -GELU_FLAT : v;", ""),
    ("an element too many", "model.cu", "if (i >= count) return;\n  const float g", "if (i > count) return;\n  const float g"),
    ("a row's filling is not zero", "model.cu", "logits[i] = i < vocabulary ? expf", "logits[i] = i <= vocabulary ? expf"),
    ("heads turned on, not back", "model.cu", "back ? -sines[pair] : sines[pair]", "sines[pair]"),
    ("heads share the wrong columns", "model.cu", "head / shape.group * shape.dim", "head % (shape.heads / shape.group) * shape.dim"),
    ("a group's first head for all", "model.cu", "shared * shape.group + g;", "shared * shape.group;"),
    ("a head's bias from the first column", "model.cu", "bias[column + i]", "bias[column - shape.first_column + i]"),
    ("an embedding's place is its token's", "model.cu", "(u64)positions[token] * width", "(u64)token * width"),
    ("an id's rows end early", "model.cu", "place < begins[blockIdx.x + 1]; place++", "place + 1 < begins[blockIdx.x + 1]; place++"),
    ("an embedding's gradient replaced", "model.cu", "gradient[id * width + i] += sum", "gradient[id * width + i] = sum"),
]
# mode: (flags, threads of a block by program, schedules)
MODES = {
    "plain": ([], {"steps": "224", "model": "256"}, "0123"),
    "thread": (["-fsanitize=thread"], {"steps": "64", "model": "64"}, "02"),
    "address": (["-fsanitize=address"], {"steps": "224", "model": "256"}, "0"),
}


def build(out, program, mode, kernels):
    objects = [out / f"{program}-{mode}.o", out / "machine.o"]
    flags = COMPILE + MODES[mode][0] + [f"-I{HERE}/machine"]
    if not objects[0].exists():
        source = HERE / f"kernels/{program}.cpp"
        subprocess.run(flags + [f"-I{KERNELS}", "-c", source, "-o", objects[0]], check=True)
    built = out / f"mutant-{mode}"
    command = flags + [f"-I{kernels}", HERE / "kernels/launch.cpp", *objects, "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"a mutant does not compile:\n{done.stderr[:2000]}")
    return built


def symptom(out, program, mode, kernels):
    """What a run shows that the right kernels never do; None where there is nothing."""
    built, (_, threads, schedules) = build(out, program, mode, kernels), MODES[mode]
    bits = set()
    for schedule in schedules:
        command = [built, threads[program]]
        if mode == "thread":
            command = ["setarch", os.uname().machine, "-R", *command]
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
        for program in ("steps", "model"):
            (out / f"{program}-{mode}.o").unlink(missing_ok=True)
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
            told = symptom(out, "model" if file == "model.cu" else "steps", mode, mutant)
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
