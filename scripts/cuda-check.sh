#!/usr/bin/env bash
# Everything about the CUDA path that can be checked without a card: scripts/cuda-check.sh [--quick] [--bugs] [DIR]
#
#   --quick   only type-check and lint the feature, with a stand-in for nvcc (a minute and a half the first time, needs no toolkit)
#   --bugs    also plant every bug of the mutation test and see that the kernel test catches it
#   DIR       what is kept between runs: toolkit, cargo's target folders, objects (default target/cuda)
#
# What runs here runs on an EMULATED device: the kernels' sources and candle's CUDA backend on the CPU. It proves values,
# bounds, races and launches, and says nothing about a card's speed.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=no bugs=no dir=target/cuda
for argument in "$@"; do
    case $argument in
    --quick) quick=yes ;;
    --bugs) bugs=yes ;;
    -*) echo "usage: scripts/cuda-check.sh [--quick] [--bugs] [DIR]" >&2 && exit 2 ;;
    *) dir=$argument ;;
    esac
done
mkdir -p "$dir" && dir=$(cd "$dir" && pwd)
started=$SECONDS
say() { echo "cuda-check [$((SECONDS - started)) s]: $*"; }

if [ $quick = yes ]; then
    # Dev profile, a target folder of its own: the empty PTX of the stand-in must never reach another build.
    # Nothing of it is run, so without debug information, and without what only a next build could use: both take space.
    export CARGO_TARGET_DIR=$dir/check CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13040
    export CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=0
    env -u CUDA_HOME -u NVCC PATH="$PWD/tests/cuda/toolchain/fake:$PATH" \
        cargo clippy --locked --all-targets --features cuda -- -D warnings
    say "the feature type-checks and lints"
    exit
fi

scripts/cuda-setup.sh "$dir"
. "$dir/env.sh"
say "toolkit ready"

for architecture in 80 90; do
    for kernel in kernels/*.cu; do
        report=$("$REAL_NVCC" -arch=sm_$architecture --std=c++17 -O3 -fmad=false -include kernels/flat.cuh -cubin \
            -Xptxas -v -Werror all-warnings "$kernel" -o /dev/null 2>&1) || { echo "$report" >&2; exit 1; }
        if grep -E 'bytes spill' <<< "$report" | grep -qvE ' 0 bytes spill stores, 0 bytes spill loads'; then
            echo "$report" >&2
            echo "cuda-check: $kernel spills registers on sm_$architecture" >&2
            exit 1
        fi
        most=$(grep -oE 'Used [0-9]+ registers' <<< "$report" | grep -oE '[0-9]+' | sort -n | tail -n 1)
        say "$kernel compiles for sm_$architecture: at most $most registers, none spilled"
    done
done

tests/cuda/kernels/check.sh "$dir/kernels"
say "every kernel agrees with its reference in four schedules, without a race or a bad access"
if [ $bugs = yes ]; then
    tests/cuda/kernels/mutations.py "$dir/kernels"
    say "every planted bug was caught"
fi

export CARGO_TARGET_DIR=$dir/target
# Linked against the stubs; --lib and the tests that need a device, not the whole suite a second time.
cargo test --release --locked --features cuda --no-run --lib --test cuda
say "the feature builds"
LD_LIBRARY_PATH=$CUDA_STUBS "$dir/target/release/vrtrain" doctor > "$dir/doctor.txt" || true
grep -q 'cuda:0 does not open' "$dir/doctor.txt" || { cat "$dir/doctor.txt" >&2; exit 1; }
say "a binary with the feature starts where the driver finds no card"

tests/cuda/device/build.sh "$dir/target" "$dir/emulated"
export LD_LIBRARY_PATH=$dir/emulated/lib VRTRAIN_REQUIRE_CUDA=1 VRTRAIN_EMULATED_DEVICE=1
cargo test --release --locked --features cuda --lib device
cargo test --release --locked --features cuda --test cuda
say "optimizers and trainer on the emulated device equal the CPU"
