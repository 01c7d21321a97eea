//! Every operation that training needs, forward and backward, one folder an operation: contract, reference, fast paths.
//!
//! Matrices are row-major slices, f32 but for activations that may be bf16 ([`Values`]). A caller owns every buffer: results and scratch (its length from the operation's
//! `scratch_len`), so that nothing is allocated in the steady state. Results do not depend on the number of threads.
//! Operations spread their work over the global rayon pool themselves: call them from one thread, best from inside the
//! pool (`rayon::scope`), which saves a wake-up each.
//!
//! A slice of the wrong length is a defect of the caller and panics; wrong data (a token outside the vocabulary) is an
//! error by value.

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod convolution;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod layer_norm;
pub mod linear;
pub mod lora;
pub mod nf4;
pub mod product;
pub mod profile;
pub mod rms_norm;
pub mod rotary;

mod parallel;
#[cfg(test)]
mod pytorch;
mod simd;
#[cfg(test)]
mod testing;
mod values;

pub use product::Into;
pub use values::{Number, Values, ValuesMut};

/// Where a gradient goes, and what becomes of what stands there.
pub struct Gradient<'a> {
    pub data: &'a mut [f32],
    pub into: Into,
}

impl<'a> Gradient<'a> {
    /// Replaces what stands in `data`.
    pub fn overwrite(data: &'a mut [f32]) -> Self {
        Self { data, into: Into::Overwrite }
    }

    /// Adds to what stands in `data`.
    pub fn accumulate(data: &'a mut [f32]) -> Self {
        Self { data, into: Into::Accumulate }
    }
}

impl<'a> From<(&'a mut [f32], bool)> for Gradient<'a> {
    /// From a slot of [`crate::params::GradientSlots`]: the numbers, and `true` to accumulate.
    fn from((data, accumulate): (&'a mut [f32], bool)) -> Self {
        Self { data, into: accumulate.into() }
    }
}
