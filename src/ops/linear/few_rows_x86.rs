//! The products of a few rows with a weight's lines on AVX-512: what [`super::few_rows`] does portably, to the same bits.
//! Written out, since the compiler makes scalar code of four rows by four lines of sums.

use super::few_rows::TILE;
use crate::ops::simd::{LANES, lanes_sum};
use half::bf16;
use std::arch::x86_64::*;

/// Sixteen numbers from memory, widened to f32; zeros where the mask has none.
pub(super) trait Load: Copy {
    /// # Safety
    /// The processor has AVX-512 (F, BW, VL), and the numbers that `mask` chooses may be read.
    unsafe fn load(from: *const Self, mask: u16) -> __m512;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Load for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        let halves = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }
}

/// products[r * TILE + c] = x_r . line_c for `rows` rows of x and TILE lines, all of `width` numbers.
///
/// # Safety
/// The processor has AVX-512 (F, BW, VL).
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn dots<N: Load>(x: &[f32], lines: [&[N]; TILE], width: usize, products: &mut [f32]) {
    assert!(lines.iter().all(|line| line.len() == width), "lines of another width");
    let mut rows = x.chunks_exact(width);
    let mut products = products.chunks_exact_mut(TILE);
    let mut write = |sums: &[[f32; TILE]]| {
        for sums in sums {
            if let Some(products) = products.next() {
                products.copy_from_slice(sums);
            }
        }
    };
    // The first tile asks memory for the lines to come; the others find these in the first-level cache.
    let mut ahead = AHEAD * width;
    while rows.len() >= TILE {
        let four = [(); TILE].map(|()| rows.next().unwrap_or_default());
        // SAFETY: every row and every line has `width` numbers.
        write(&unsafe { tile(four, lines, width, ahead) });
        ahead = 0;
    }
    for row in rows {
        // SAFETY: as above.
        write(&unsafe { tile([row], lines, width, ahead) });
        ahead = 0;
    }
}

/// How many lines ahead memory is asked for them. A line is too short for the processor's own prefetcher to get going.
const AHEAD: usize = 2 * TILE;

/// # Safety
/// The processor has AVX-512 (F, BW, VL); rows and lines have `width` numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn tile<const R: usize, N: Load>(
    x: [&[f32]; R],
    lines: [&[N]; TILE],
    width: usize,
    ahead: usize,
) -> [[f32; TILE]; R] {
    let mut sums = [[_mm512_setzero_ps(); TILE]; R];
    for place in (0..width).step_by(LANES) {
        if ahead > 0 {
            for line in lines {
                // A prefetch of any address is harmless, so that the last lines may look beyond the weight.
                _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(place + ahead).cast());
            }
        }
        let mask = (0xffff_ffffu32 >> (32 - (width - place).min(LANES))) as u16;
        // SAFETY: the mask ends where rows and lines do.
        let lines = lines.map(|line| unsafe { N::load(line.as_ptr().add(place), mask) });
        for (sums, x) in sums.iter_mut().zip(x) {
            // SAFETY: as above.
            let x = unsafe { f32::load(x.as_ptr().add(place), mask) };
            for (sum, line) in sums.iter_mut().zip(lines) {
                // Two roundings, as everywhere else.
                *sum = _mm512_add_ps(*sum, _mm512_mul_ps(x, line));
            }
        }
    }
    sums.map(|sums| {
        sums.map(|sum| {
            let mut lanes = [0.0; LANES];
            // SAFETY: there is room for sixteen.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sum) };
            lanes_sum(lanes)
        })
    })
}
