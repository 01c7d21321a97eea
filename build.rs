//! Compiles kernels/*.cu to PTX with nvcc where the `cuda` feature is on; does nothing otherwise.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// PTX for this architecture runs on every card from it on: the driver compiles it for the one that it finds.
const ARCHITECTURE: &str = "compute_80";

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?);
    let entries = fs::read_dir("kernels").map_err(|e| format!("cannot list the folder kernels: {e}"))?;
    let mut sources: Vec<PathBuf> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    sources.sort();
    let nvcc = nvcc();
    for source in sources.iter().filter(|path| path.extension().is_some_and(|extension| extension == "cu")) {
        compile(&nvcc, source, &out)?;
    }
    Ok(())
}

/// The compiler: $NVCC, else that of $CUDA_HOME or $CUDA_PATH, else the one on PATH.
fn nvcc() -> PathBuf {
    let home = || env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH"));
    let in_home = || home().map(|home| PathBuf::from(home).join("bin/nvcc")).filter(|path| path.exists());
    env::var_os("NVCC").map(PathBuf::from).or_else(in_home).unwrap_or_else(|| "nvcc".into())
}

/// Every kernel file begins with what they share. `-fmad=false`: a product and a sum are rounded apart, as the CPU path does it, so that both give the same bits.
/// The kernels wait for memory, not for arithmetic.
fn compile(nvcc: &Path, source: &Path, out: &Path) -> Result<(), String> {
    let name = source.with_extension("ptx");
    let target = out.join(name.file_name().ok_or("a kernel without a file name")?);
    let mut command = Command::new(nvcc);
    command.args(["-ptx", "-O3", "--std=c++17", "-lineinfo", "-fmad=false", "-Werror", "all-warnings"]);
    command.args(["-include", "kernels/flat.cuh"]);
    command.arg(format!("-arch={ARCHITECTURE}")).arg("-o").arg(&target).arg(source);
    let status = command.status().map_err(|e| {
        format!(
            "cannot run {}: {e}. The cuda feature needs the CUDA toolkit: set NVCC or CUDA_HOME, or run \
                 scripts/cuda-setup.sh and source the env.sh that it writes",
            nvcc.display()
        )
    })?;
    if status.success() { Ok(()) } else { Err(format!("{} failed on {}", nvcc.display(), source.display())) }
}
