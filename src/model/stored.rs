//! Buffers of what a block keeps for its backward pass: f32, or bf16 where the products round to it anyway.

use crate::ops::product::{Numbers, Precision, Threads, narrow};
use crate::ops::{Values, ValuesMut};
use crate::params::filled;
use half::bf16;

/// A buffer that lives as long as the run.
pub enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Stored {
    pub fn new(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(Vec::new()),
            Precision::Bf16 => Self::Bf16(Vec::new()),
        }
    }

    /// Makes the buffer `len` long. What it holds is for the next pass to overwrite.
    pub fn fit(&mut self, len: usize) {
        match self {
            Self::F32(numbers) => fit_one(numbers, len),
            Self::Bf16(numbers) => fit_one(numbers, len),
        }
    }

    /// Fills the buffer by way of `write`, whose f32 results are rounded from `raw` where the buffer is bf16.
    pub fn fill(&mut self, raw: &mut [f32], write: impl FnOnce(&mut [f32])) {
        match self {
            Self::F32(numbers) => write(numbers),
            Self::Bf16(numbers) => {
                let raw = &mut raw[..numbers.len()];
                write(raw);
                narrow(Threads::All, raw, numbers);
            }
        }
    }

    pub fn values(&self) -> Values<'_> {
        match self {
            Self::F32(numbers) => Values::F32(numbers),
            Self::Bf16(numbers) => Values::Bf16(numbers),
        }
    }

    pub fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Self::F32(numbers) => ValuesMut::F32(numbers),
            Self::Bf16(numbers) => ValuesMut::Bf16(numbers),
        }
    }

    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(numbers) => size_of_val(&numbers[..]),
            Self::Bf16(numbers) => size_of_val(&numbers[..]),
        }
    }
}

impl<'a> From<&'a Stored> for Numbers<'a> {
    fn from(stored: &'a Stored) -> Self {
        stored.values().into()
    }
}

impl<'a> From<&'a Stored> for Values<'a> {
    fn from(stored: &'a Stored) -> Self {
        stored.values()
    }
}

impl<'a> From<&'a mut Stored> for ValuesMut<'a> {
    fn from(stored: &'a mut Stored) -> Self {
        stored.values_mut()
    }
}

/// Bytes of one number in a [`Stored`].
pub fn stored_size(precision: Precision) -> usize {
    match precision {
        Precision::F32 => size_of::<f32>(),
        Precision::Bf16 => size_of::<bf16>(),
    }
}

/// Makes every buffer `len` long. What it holds is for the next pass to overwrite.
pub fn fit<const N: usize>(buffers: [&mut Vec<f32>; N], len: usize) {
    buffers.into_iter().for_each(|buffer| fit_one(buffer, len));
}

fn fit_one<N: Copy + Default>(buffer: &mut Vec<N>, len: usize) {
    if buffer.capacity() < len {
        // The old one goes first.
        *buffer = Vec::new();
        *buffer = filled(N::default(), len);
    } else {
        buffer.resize(len, N::default());
    }
}
