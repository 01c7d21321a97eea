#!/usr/bin/env bash
# The emulated device: device/build.sh TARGET OUT
#
# TARGET is the folder in which cargo has built with the cuda feature (its PTX of candle's kernels tells their names);
# OUT/lib gets libcuda.so.1 and its companions: put it first in LD_LIBRARY_PATH. Needs the environment of
# scripts/cuda-setup.sh. candle's own kernels are compiled unmodified from its crate.
set -euo pipefail
target=$(cd "${1:?usage: build.sh TARGET OUT}" && pwd)
out=$(mkdir -p "${2:?usage: build.sh TARGET OUT}/lib" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
: "${CUDA_HOME:?source the env.sh that scripts/cuda-setup.sh writes}" "${CANDLE_KERNELS:?source env.sh}"

flags=(-std=c++17 -g -fPIC -ffp-contract=off -fno-strict-aliasing -Imachine)
toolkit=(-I"$CUDA_HOME/include" -I"$CUDA_HOME/include/cccl" -I"$CANDLE_KERNELS")
modules=(affine binary unary fill ternary cast reduce indexing)

# The newest PTX of a module below TARGET.
ptx_of() {
    local found
    found=$(find "$target" -path "*/candle-kernels-*/out/$1.ptx" -size +0 -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
    [ -n "$found" ] || { echo "device: no PTX of candle's $1 below $target: build with --features cuda first" >&2; exit 1; }
    echo "$found"
}

starters=''
for module in "${modules[@]}"; do
    source=$out/candle_$module.cpp
    ptx=$(ptx_of "$module")
    starters+=" START($module)"
    if [ "$out/candle_$module.o" -nt "$ptx" ]; then continue; fi
    {
        echo '#include "candle.h"'
        echo "namespace {"
        echo "#include \"$module.cu\""
        echo "}"
        echo "extern \"C\" int candle_cpu_launch_$module(const char* name, uint3 grid, uint3 block, unsigned shared, void** parameters) {"
        # Names are sorted so that the same PTX gives the same source.
        grep -o '\.entry [A-Za-z0-9_]*' "$ptx" | cut -d' ' -f2 | sort -u | while read -r kernel; do
            echo "  if (!strcmp(name, \"$kernel\")) return cuda_cpu::launch($kernel, grid, block, shared, parameters), 0;"
        done
        echo "  return 1;"
        echo "}"
    } > "$source"
    g++ "${flags[@]}" -O1 -w -Idevice "${toolkit[@]}" -c "$source" -o "$out/candle_$module.o"
done
{
    echo "struct uint3 { unsigned x, y, z; };"
    echo "#define START(module) extern \"C\" int candle_cpu_launch_##module(const char*, uint3, uint3, unsigned, void**);"
    echo "$starters"
    echo "#undef START"
    echo "#define START(module) if (!candle_cpu_launch_##module(name, grid, block, shared, parameters)) return 0;"
    echo "extern \"C\" int candle_cpu_launch(const char* name, uint3 grid, uint3 block, unsigned shared, void** parameters) {"
    echo "$starters"
    echo "  return 1;"
    echo "}"
} > "$out/candle.cpp"

g++ "${flags[@]}" -O2 -Wall -Wextra -c machine/machine.cpp -o "$out/machine.o"
g++ "${flags[@]}" -O1 -w -I../../kernels -c kernels/launch.cpp -o "$out/launch.o"
g++ "${flags[@]}" -O1 -w -c "$out/candle.cpp" -o "$out/candle.o"
g++ "${flags[@]}" -O2 -Wall -c device/driver.cpp -o "$out/driver.o"
g++ "${flags[@]}" -O2 -Wall -c device/libraries.cpp -o "$out/libraries.o"
g++ -shared "$out"/candle_*.o "$out/candle.o" "$out/machine.o" "$out/launch.o" "$out/driver.o" "$out/libraries.o" \
    -Wl,-soname,libcuda.so.1 -o "$out/lib/libcuda.so.1"
for name in libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnvrtc.so.13; do
    ln -sf libcuda.so.1 "$out/lib/$name"
done
ln -sf "$(readlink -f "$CUDA_HOME/lib64/libcudart.so.13")" "$out/lib/libcudart.so.13" # the real one, from the wheel
echo "device: $out/lib is ready"
