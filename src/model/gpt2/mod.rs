//! GPT-2: shape, Hugging Face files, and its forward and backward.

mod block;
mod config;
mod cpu;
mod decode;
mod generic;
mod load;
pub mod twin;

pub use config::{BlockParameters, Gpt2Config, Gpt2Parameters, LinearParameters, NormParameters};
pub use cpu::Gpt2Cpu;
pub use generic::Gpt2Generic;
pub use load::stored;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod trained_tests;
