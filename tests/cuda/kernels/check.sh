#!/usr/bin/env bash
# The kernels on the emulated device: kernels/check.sh OUT   builds steps.cpp and model.cpp plain, under ThreadSanitizer
# and under AddressSanitizer, runs each in four schedules of threads and blocks, and compares the bits between the schedules.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: check.sh OUT}" && cd "$1" && pwd)
kernels=${KERNELS:-../../kernels}

g++ -std=c++17 -O2 -g -fPIC -Wall -Wextra -Werror -c machine/machine.cpp -o "$out/machine.o" # never with -fsanitize
for mode in plain thread address; do
    case $mode in plain) sanitize=() ;; *) sanitize=("-fsanitize=$mode") ;; esac
    # The names of a pragma, and of functions that only one side of flat.cuh uses, are no concern of the host compiler.
    compile=(g++ -std=c++17 -O1 -g -ffp-contract=off -fno-strict-aliasing -Wall -Wno-unused-function "${sanitize[@]}"
        -Imachine -I"$kernels")
    "${compile[@]}" -c kernels/launch.cpp -o "$out/launch-$mode.o"
    for program in steps model; do
        "${compile[@]}" "kernels/$program.cpp" "$out/launch-$mode.o" "$out/machine.o" -o "$out/$program-$mode"
        # ThreadSanitizer knows 255 threads: small blocks. It wants its shadow where the kernel may have put something else.
        case $program in steps) threads=224 ;; model) threads=256 ;; esac
        run=()
        if [ $mode = thread ]; then threads=64 run=(setarch "$(uname -m)" -R); fi
        for order in 0 1 2 3; do
            CUDA_CPU_ORDER=$order "${run[@]}" "$out/$program-$mode" "$threads" > "$out/$program-$mode-$order.log" || {
                grep -v '^ok' "$out/$program-$mode-$order.log" || true
                echo "kernels: $program, $mode, schedule $order failed" >&2
                exit 1
            }
        done
        if [ "$(cat "$out/$program-$mode"-?.log | grep '^bits=' | sort -u | wc -l)" != 1 ]; then
            echo "kernels: $program, $mode: the bits differ between schedules" >&2
            exit 1
        fi
        echo "kernels: $program, $mode: $(grep -c '^ok' "$out/$program-$mode-0.log") cases, the same bits in 4 schedules"
    done
done
