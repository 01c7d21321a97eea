#!/usr/bin/env bash
# The kernels on the emulated device: kernels/check.sh OUT   builds steps.cpp plain, under ThreadSanitizer and under
# AddressSanitizer, runs each in four schedules of threads and blocks, and compares the bits between the schedules.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: check.sh OUT}" && cd "$1" && pwd)
kernels=${KERNELS:-../../kernels}

g++ -std=c++17 -O2 -g -fPIC -Wall -Wextra -Werror -c machine/machine.cpp -o "$out/machine.o" # never with -fsanitize
for mode in plain thread address; do
    case $mode in plain) sanitize=() ;; *) sanitize=("-fsanitize=$mode") ;; esac
    # The names of a pragma, and of functions that only one side of flat.cuh uses, are no concern of the host compiler.
    g++ -std=c++17 -O1 -g -ffp-contract=off -fno-strict-aliasing -Wall -Wno-unused-function "${sanitize[@]}" \
        -Imachine -I"$kernels" kernels/launch.cpp kernels/steps.cpp "$out/machine.o" -o "$out/steps-$mode"
    # ThreadSanitizer knows 255 threads: blocks of 64. It wants its shadow where the kernel may have put something else.
    threads=(224)
    run=()
    if [ $mode = thread ]; then threads=(64) run=(setarch "$(uname -m)" -R); fi
    for order in 0 1 2 3; do
        CUDA_CPU_ORDER=$order "${run[@]}" "$out/steps-$mode" "${threads[@]}" > "$out/$mode-$order.log" || {
            grep -v '^ok' "$out/$mode-$order.log" || true
            echo "kernels: $mode, schedule $order failed" >&2
            exit 1
        }
    done
    if [ "$(cat "$out/$mode"-?.log | grep '^bits=' | sort -u | wc -l)" != 1 ]; then
        echo "kernels: $mode: the bits differ between schedules" >&2
        exit 1
    fi
    echo "kernels: $mode: $(grep -c '^ok' "$out/$mode-0.log") cases, the same bits in 4 schedules"
done
