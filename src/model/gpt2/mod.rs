//! GPT-2: shape, initial weights, Hugging Face files, and its forward and backward.

mod config;
mod cpu;
mod decode;
mod generic;
mod init;
mod load;
pub mod twin;

pub use config::{BlockParameters, Gpt2Config, Gpt2Parameters, Head, LinearParameters, NormParameters};
pub use cpu::Gpt2Cpu;
pub use decode::KeyValueCache;
pub use generic::Gpt2Generic;
pub use init::initialize;
pub use load::load;

use super::LossSum;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod trained_tests;
