//! From f32 to NF4.

use super::table::{CODE, SCALES, borders, scale_table};
use crate::ops::simd::{Level, kernel};
use crate::params::{NF4_BLOCK, NF4_SCALES, Nf4};
use rayon::prelude::*;

/// Blocks that one task quantises.
const BLOCKS: usize = 512;

/// The smallest scale that is divided by: a block of zeros stays zeros.
const SMALLEST: f32 = 1e-38;

/// Quantises `numbers`, which are finite.
pub fn quantize(numbers: &[f32]) -> Nf4 {
    let level = Level::current();
    let blocks = numbers.len().div_ceil(NF4_BLOCK);
    let (mut codes, mut scales) = (vec![0u8; numbers.len().div_ceil(2)], vec![0f32; blocks]);
    numbers
        .par_chunks(BLOCKS * NF4_BLOCK)
        .zip(codes.par_chunks_mut(BLOCKS * NF4_BLOCK / 2))
        .zip(scales.par_chunks_mut(BLOCKS))
        .for_each(|((numbers, codes), scales)| quantize_blocks(level, numbers, codes, scales));

    let offset = if blocks == 0 { 0.0 } else { scales.iter().map(|&s| f64::from(s)).sum::<f64>() / blocks as f64 };
    let offset = offset as f32;
    scales.iter_mut().for_each(|scale| *scale -= offset);
    let borders: [f32; SCALES - 1] = borders(scale_table());
    let mut scale_codes = Vec::with_capacity(blocks);
    let mut scale_maxima = Vec::with_capacity(blocks.div_ceil(NF4_SCALES));
    for group in scales.chunks(NF4_SCALES) {
        let largest = group.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        scale_maxima.push(largest);
        let scaled = Scaled::of(largest, group.len() == NF4_SCALES);
        scale_codes.extend(group.iter().map(|&x| borders.partition_point(|&border| border < scaled.apply(x)) as u8));
    }
    Nf4 { codes, scale_codes, scale_maxima, offset, len: numbers.len() }
}

/// How a block's numbers are brought to [-1, 1]: bitsandbytes multiplies whole blocks by the inverse and divides those
/// at the end of a tensor, which rounds differently.
#[derive(Clone, Copy)]
struct Scaled {
    largest: f32,
    inverse: f32,
    whole: bool,
}

impl Scaled {
    #[inline(always)]
    fn of(largest: f32, whole: bool) -> Self {
        let largest = if largest > SMALLEST { largest } else { SMALLEST };
        Self { largest, inverse: 1.0 / largest, whole }
    }

    #[inline(always)]
    fn apply(self, x: f32) -> f32 {
        let scaled = if self.whole { x * self.inverse } else { x / self.largest };
        let scaled = if scaled > 1.0 { 1.0 } else { scaled };
        if scaled < -1.0 { -1.0 } else { scaled }
    }
}

kernel! {
    /// Codes and scales of whole blocks and of what is left at the end.
    fn quantize_blocks(numbers: &[f32], codes: &mut [u8], scales: &mut [f32]) {
        let borders: [f32; 15] = borders(&CODE);
        let blocks = numbers.chunks(NF4_BLOCK).zip(codes.chunks_mut(NF4_BLOCK / 2)).zip(scales);
        for ((numbers, codes), scale) in blocks {
            // Zeros beyond the end: code 7, as bitsandbytes pads an odd number.
            let mut block = [0f32; NF4_BLOCK];
            block[..numbers.len()].copy_from_slice(numbers);
            let mut largest = 0f32;
            for x in block {
                let x = x.abs();
                largest = if x > largest { x } else { largest };
            }
            *scale = largest;
            let scaled = Scaled::of(largest, numbers.len() == NF4_BLOCK);
            let mut code = [0u32; NF4_BLOCK];
            for (code, x) in code.iter_mut().zip(block) {
                let x = scaled.apply(x);
                *code = borders.iter().map(|&border| u32::from(x > border)).sum();
            }
            for (byte, pair) in codes.iter_mut().zip(code.chunks_exact(2)) {
                *byte = (pair[0] << 4 | pair[1]) as u8;
            }
        }
    }
}
