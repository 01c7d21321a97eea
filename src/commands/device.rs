//! The device of a run: which one, why, and what to do where it refuses.

use crate::config::{DeviceChoice, RunConfig};
use anyhow::Result;
use candle_core::Device;

/// Opens the device that the config names and writes down which one it became and why.
pub fn choose(config: &mut RunConfig, reasons: &mut Vec<String>) -> Result<Device> {
    let (device, choice, reason) =
        resolve(config.train.device).map_err(|why| config.settings.0.error("train.device", why))?;
    config.train.device = choice;
    reasons.push(format!("device     {reason}"));
    Ok(device)
}

/// The device that `choice` asks for, which one it became, and why in words.
///
/// # Errors
/// When a card was asked for and there is none, or this build has no use for one: what to do about it.
pub fn resolve(choice: DeviceChoice) -> Result<(Device, DeviceChoice, String), String> {
    let cpu = |why: String| Ok((Device::Cpu, DeviceChoice::Cpu, format!("cpu ({why})")));
    let built = cfg!(feature = "cuda");
    match choice {
        DeviceChoice::Cpu => cpu("as asked".into()),
        DeviceChoice::Auto if !built => cpu("built without CUDA".into()),
        DeviceChoice::Auto => match open(0) {
            Ok(device) => Ok((device, DeviceChoice::Cuda(0), "cuda:0 (found)".into())),
            Err(why) => cpu(why),
        },
        DeviceChoice::Cuda(_) if !built => {
            Err("this vrtrain is built without CUDA: build it with --features cuda, or use \"cpu\"".into())
        }
        DeviceChoice::Cuda(ordinal) => match open(ordinal) {
            Ok(device) => Ok((device, choice, format!("cuda:{ordinal} (as asked)"))),
            Err(why) => Err(format!("{why}; `nvidia-smi` lists the cards, and \"cpu\" needs none")),
        },
    }
}

/// The card, or why it does not open, on one line.
pub fn open(ordinal: usize) -> Result<Device, String> {
    Device::new_cuda(ordinal).map_err(|error| {
        let text = error.to_string();
        // The first line; candle adds a backtrace where one is asked for.
        let line = text.lines().next().unwrap_or_default();
        let known = [
            ("CUDA_ERROR_NO_DEVICE", "the driver finds no card"),
            ("CUDA_ERROR_INVALID_DEVICE", "there is no card of this number"),
            ("CUDA_ERROR_INSUFFICIENT_DRIVER", "the driver is older than the toolkit that built this vrtrain"),
            ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "the driver's library and its kernel module differ"),
        ];
        let meaning = known.iter().find(|(name, _)| line.contains(name)).map(|(_, meaning)| format!("{meaning}: "));
        format!("cuda:{ordinal} does not open: {}{line}", meaning.unwrap_or_default())
    })
}

/// Lets a card's products round what they read to TF32 (8 bits of exponent, 11 of precision) from now on; sums stay f32.
pub fn allow_tf32(device: &Device) -> Result<(), &'static str> {
    if !device.is_cuda() {
        return Err("only a CUDA card has such products; use \"f32\", \"bf16\" or \"auto\"");
    }
    candle_core::cuda::set_gemm_reduced_precision_f32(true);
    Ok(())
}

/// Says what to do where `error` is a card's memory that is full.
pub fn explain(error: anyhow::Error) -> anyhow::Error {
    let full = ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"];
    let is_full = error.chain().any(|cause| full.iter().any(|name| cause.to_string().contains(name)));
    if !is_full {
        return error;
    }
    error.context(
        "the card's memory is full: lower train.micro_batch (train.tokens_per_step may stay) or \
         train.sequence_length, set train.recompute = \"block\", or train a smaller model; `vrtrain plan` prints what a \
         run needs",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_memory_is_explained_and_the_cause_stays_in_the_chain() {
        let cause = anyhow::anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")").context("step 3");
        let chain: Vec<String> = explain(cause).chain().map(ToString::to_string).collect();
        assert!(chain[0].contains("train.micro_batch") && chain[2].contains("CUDA_ERROR_OUT_OF_MEMORY"), "{chain:?}");
        assert_eq!(explain(anyhow::anyhow!("no such file")).to_string(), "no such file");
    }
}
