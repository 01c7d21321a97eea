#!/usr/bin/env bash
# A CUDA toolkit without a GPU, an installer or root: scripts/cuda-setup.sh [DIR]   (default target/cuda)
#
# Takes the compiler from NVIDIA's wheels on PyPI and makes link stubs for the libraries that only a driver or the
# full toolkit brings. That is enough to build and lint `--features cuda`; running needs a driver (or the emulated
# device of tests/cuda). Leaves DIR/env.sh to be sourced. The wheels stand under NVIDIA's licence: nothing of them
# belongs into the repository.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-$project/target/cuda}"
dir=$(cd "${1:-$project/target/cuda}" && pwd)
case $dir in *' '*) echo "cuda-setup: no spaces in the folder's path, please: $dir" >&2; exit 2;; esac

# 13.4 is the newest toolkit that cudarc 0.19 knows. A card whose driver is older (`nvidia-smi` shows the CUDA that it
# takes) needs an older one: VRTRAIN_CUDA_TOOLKIT=13.0.2, and a folder of its own.
version=${VRTRAIN_CUDA_TOOLKIT:-13.4.3}
if [ ! -e "$dir/wheels-$version" ]; then
    [ -x "$dir/python/bin/pip" ] || python3 -m venv "$dir/python"
    # nvcc's wheel takes any nvvm and crt of its major version, whose PTX its assembler may not know yet.
    minor=$(cut -d . -f 1,2 <<< "$version")
    "$dir/python/bin/pip" install --quiet --disable-pip-version-check "cuda-toolkit[nvcc,cudart,cccl]==$version" \
        "nvidia-nvvm==$minor.*" "nvidia-cuda-crt==$minor.*"
    touch "$dir/wheels-$version"
fi
wheels=$(echo "$dir"/python/lib/python3*/site-packages/nvidia/cu13)

# The wheels' folders under the names that build scripts look for.
home=$dir/home
rm -rf "$home" && mkdir -p "$home/lib64/stubs"
for folder in bin include nvvm; do ln -s "$wheels/$folder" "$home/$folder"; done
for library in "$wheels"/lib/*; do
    name=${library##*/}
    ln -s "$library" "$home/lib64/$name"
    case $name in *.so.*) ln -sf "$library" "$home/lib64/${name%%.so.*}.so" ;; esac
done
ln -s lib64 "$home/lib"

cd "$project"
cargo fetch --quiet --locked
locked() { awk -v name="\"$1\"" '$1 == "name" { here = $3 == name } here && $1 == "version" { gsub(/"/, "", $3); print $3 }' Cargo.lock; }
source_of() {
    local found
    found=$(find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -maxdepth 2 -name "$1-$(locked "$1")" | head -n 1)
    [ -n "$found" ] || { echo "cuda-setup: no sources of $1 after cargo fetch" >&2; exit 1; }
    echo "$found"
}
cudarc=$(source_of cudarc)
candle_kernels=$(source_of candle-kernels)
python3 tests/cuda/toolchain/stub_libraries.py "$cudarc" "$home/lib64/stubs"

# Absolute paths: build scripts run in other folders.
cat > "$dir/env.sh" <<END
export CUDA_HOME=$home CUDA_COMPUTE_CAP=80 CUDAFORGE_THREADS=\${CUDAFORGE_THREADS:-2} REAL_NVCC=$home/bin/nvcc
export CUDA_STUBS=$home/lib64/stubs:$home/lib64 CANDLE_KERNELS=$candle_kernels/src
export PATH=$project/tests/cuda/toolchain/fast:$home/bin:\$PATH
END
echo "cuda-setup: ready; source $dir/env.sh"
