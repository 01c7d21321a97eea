//! From NF4 to f32: any range of a tensor, so that a product unpacks a panel at a time and never the whole matrix.

use super::table::{CODE, scale_table};
use crate::ops::simd::{Level, Set};
use crate::params::{NF4_BLOCK, NF4_SCALES, Nf4};
use rayon::prelude::*;

/// Writes the numbers from the `first` on to `out`. The same bits on every instruction set: one product each.
///
/// # Panics
/// When the range reaches beyond the tensor.
pub fn dequantize(level: Level, from: &Nf4, first: usize, out: &mut [f32]) {
    assert!(first + out.len() <= from.len, "dequantize: {first} + {} of {} numbers", out.len(), from.len);
    let table = scale_table();
    let (mut place, mut rest) = (first, out);
    while !rest.is_empty() {
        let block = place / NF4_BLOCK;
        let here = (NF4_BLOCK - place % NF4_BLOCK).min(rest.len());
        let (now, later) = rest.split_at_mut(here);
        let scale = table[from.scale_codes[block] as usize] * from.scale_maxima[block / NF4_SCALES] + from.offset;
        part_of_block(level, &from.codes, place, scale, now);
        (place, rest) = (place + here, later);
    }
}

/// Writes all numbers, in parallel.
pub fn dequantize_all(from: &Nf4, out: &mut [f32]) {
    const PIECE: usize = 1024 * NF4_BLOCK;
    assert_eq!(out.len(), from.len, "dequantize: the whole tensor");
    let level = Level::current();
    let pieces = out.par_chunks_mut(PIECE).enumerate();
    pieces.for_each(|(piece, out)| dequantize(level, from, piece * PIECE, out));
}

/// The numbers from `first` on, which have one scale.
#[inline]
fn part_of_block(level: Level, codes: &[u8], first: usize, scale: f32, out: &mut [f32]) {
    // Vectors begin with a whole byte.
    let odd = (first % 2).min(out.len());
    let (head, out) = out.split_at_mut(odd);
    one_by_one(codes, first, scale, head);
    let first = first + odd;
    let done = match level.set() {
        Set::Portable => 0,
        // SAFETY: a `Level` of this set exists only where the processor has it.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => unsafe { super::dequantize_x86::avx2(&codes[first / 2..], scale, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { super::dequantize_x86::avx512(&codes[first / 2..], scale, out) },
    };
    one_by_one(codes, first + done, scale, &mut out[done..]);
}

fn one_by_one(codes: &[u8], first: usize, scale: f32, out: &mut [f32]) {
    for (place, out) in (first..).zip(out) {
        let byte = codes[place / 2];
        let code = if place % 2 == 0 { byte >> 4 } else { byte & 15 };
        *out = CODE[code as usize] * scale;
    }
}
