//! NF4 with double quantisation: weights in 4 bits, as bitsandbytes stores them (Dettmers et al., "QLoRA", 2023).
//!
//! The numbers of a tensor, in the order of memory, are cut into blocks of 64. A block's scale is its largest |x|; each
//! x becomes the code of the number nearest to x / scale in [`CODE`], the lower one where two are equally near. The
//! scales are quantised themselves: less their mean (`offset`), in blocks of 256, each divided by its block's largest
//! |scale - offset|, to the nearest of the 256 numbers of [`scale_table`].
//!
//! Codes, and the numbers that codes and scales stand for, equal bitsandbytes' bit for bit; the mean of the scales is
//! taken in f64 here and in f32 there. (bitsandbytes' native CPU library chooses a scale's second nearest code at some
//! near ties, 0.2% of them; its CUDA kernel and its reference, as here, the nearest.)

mod dequantize;
#[cfg(target_arch = "x86_64")]
mod dequantize_x86;
mod quantize;
mod table;
#[cfg(test)]
mod tests;

pub(super) use dequantize::dequantize;
pub use dequantize::dequantize_all;
pub use quantize::quantize;
pub use table::{CODE, scale_table};
