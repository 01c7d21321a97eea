//! Dequantising with vectors: a byte becomes two lanes, a lane's low four bits choose from a table in registers.

use super::table::CODE;
use std::arch::x86_64::*;

/// Writes as many numbers as whole vectors of 16 hold, two from each byte of `codes`; says how many.
///
/// # Safety
/// The processor has AVX512-F.
#[target_feature(enable = "avx2,avx512f")]
pub unsafe fn avx512(codes: &[u8], scale: f32, out: &mut [f32]) -> usize {
    const NUMBERS: usize = 16;
    let vectors = (out.len() / NUMBERS).min(codes.len() / (NUMBERS / 2));
    // SAFETY: the table has 16 numbers; `codes` and `out` have those of `vectors` vectors.
    unsafe {
        let (table, scale) = (_mm512_loadu_ps(CODE.as_ptr()), _mm512_set1_ps(scale));
        for vector in 0..vectors {
            let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(codes.as_ptr().add(vector * NUMBERS / 2).cast()));
            // The high half of a byte in the low lane, its low half in the high lane; above bit 3 the choice is blind.
            let choice = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
            let numbers = _mm512_mul_ps(_mm512_permutexvar_ps(choice, table), scale);
            _mm512_storeu_ps(out.as_mut_ptr().add(vector * NUMBERS), numbers);
        }
    }
    vectors * NUMBERS
}

/// As [`avx512`], in vectors of 8.
///
/// # Safety
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn avx2(codes: &[u8], scale: f32, out: &mut [f32]) -> usize {
    const NUMBERS: usize = 8;
    let vectors = (out.len() / NUMBERS).min(codes.len() / (NUMBERS / 2));
    // SAFETY: the table has two vectors of 8; `codes` and `out` have the numbers of `vectors` vectors.
    unsafe {
        let (low, high) = (_mm256_loadu_ps(CODE.as_ptr()), _mm256_loadu_ps(CODE.as_ptr().add(NUMBERS)));
        let scale = _mm256_set1_ps(scale);
        for vector in 0..vectors {
            let four = codes.as_ptr().add(vector * NUMBERS / 2).cast::<i32>().read_unaligned();
            let bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            let choice = _mm256_or_si256(_mm256_srli_epi64::<4>(bytes), _mm256_slli_epi64::<32>(bytes));
            let [low, high] = [low, high].map(|half| _mm256_permutevar8x32_ps(half, choice));
            // Bit 3 says which half; the blend looks at a lane's sign.
            let which = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(choice));
            let numbers = _mm256_mul_ps(_mm256_blendv_ps(low, high, which), scale);
            _mm256_storeu_ps(out.as_mut_ptr().add(vector * NUMBERS), numbers);
        }
    }
    vectors * NUMBERS
}
