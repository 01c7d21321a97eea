#!/usr/bin/env python3
"""Link stubs for every library that cudarc links, made from cudarc's own declarations.

    stub_libraries.py CUDARC_SOURCE_FOLDER OUTPUT_FOLDER

Every function of a stub fails: libcuda's answer CUDA_ERROR_NO_DEVICE, so that a program linked against them starts
on a machine without a driver and finds no device.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

CUDA_ERROR_NO_DEVICE = 100
# library: (cudarc's module, prefix of its functions, file name that the loader asks for)
LIBRARIES = {
    "cuda": ("driver", "cu", "libcuda.so.1"),
    "nvrtc": ("nvrtc", "nvrtc", "libnvrtc.so.13"),
    "curand": ("curand", "curand", "libcurand.so.10"),
    "cublas": ("cublas", "cublas", "libcublas.so.13"),
    "cublasLt": ("cublaslt", "cublasLt", "libcublasLt.so.13"),
}


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    cudarc, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    for library, (module, prefix, so_name) in LIBRARIES.items():
        declarations = "".join(path.read_text() for path in sorted((cudarc / "src" / module / "sys").glob("*.rs")))
        functions = sorted(set(re.findall(r"\bfn (" + prefix + r"[A-Z]\w*)\s*\(", declarations)))
        if not functions:
            sys.exit(f"stub_libraries: no {prefix}* functions in {cudarc}/src/{module}/sys: not cudarc's sources?")
        answer = CUDA_ERROR_NO_DEVICE if library == "cuda" else 1
        source = "\n".join(f"int {name}(void) {{ return {answer}; }}" for name in functions)
        target = output / f"lib{library}.so"
        command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{so_name}", "-o", str(target)]
        subprocess.run(command, input=source, text=True, check=True)
        link = output / so_name
        if not os.path.lexists(link):
            link.symlink_to(target.name)
        print(f"stub_libraries: {target.name} with {len(functions)} functions")


if __name__ == "__main__":
    main()
