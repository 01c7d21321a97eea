//! Kernels for x86-64: AVX-512 with bf16 pairs, AVX-512 and AVX2 with f32 words.

use super::tile::{COLUMNS, ROWS, Rows, SHORT, Tile};
use std::arch::x86_64::*;

/// Lanes of a 512-bit register of f32.
const WIDE: usize = 16;
/// Lanes of a 256-bit register of f32.
const HALF: usize = 8;

/// An AVX-512 kernel: 8 rows by up to three registers of columns stay in 24 accumulators; each step loads a row of the
/// panel of B and broadcasts eight words of the panel of A.
macro_rules! avx512_kernel {
    ($(#[$doc:meta])* $name:ident, $sums:ident, $features:literal, $multiply_add:expr) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// See [`super::tile::Kernel`].
        pub(super) unsafe fn $name(steps: usize, a: Rows, b: *const u32, tile: &Tile) {
            // SAFETY: the caller's promise; narrow tiles only leave registers of zeros out.
            unsafe {
                match (a.row_stride, tile.columns.div_ceil(WIDE)) {
                    (1, 0 | 1) => $sums::<1, true>(steps, a, b, tile),
                    (1, 2) => $sums::<2, true>(steps, a, b, tile),
                    (1, _) => $sums::<3, true>(steps, a, b, tile),
                    (_, 0 | 1) => $sums::<1, false>(steps, a, b, tile),
                    (_, 2) => $sums::<2, false>(steps, a, b, tile),
                    (_, _) => $sums::<3, false>(steps, a, b, tile),
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn $sums<const REGISTERS: usize, const ADJOINING_ROWS: bool>(
            steps: usize,
            a: Rows,
            b: *const u32,
            tile: &Tile,
        ) {
            // SAFETY: rows and panel hold `steps` steps, and the tile may be written.
            unsafe {
                let mut sums = [[_mm512_setzero_ps(); REGISTERS]; ROWS];
                let starts: [_; ROWS] = a.starts(0, tile.rows);
                let (mut first, mut b) = (a.first, b);
                // What stands elsewhere and is added has to be read apart from C.
                let residual = tile.addend.filter(|&(addend, _)| addend != tile.c.cast_const());
                // The steps in eighths, one by one or all at once.
                let eighths = if steps < SHORT { ROWS } else { 1 };
                let mut from = 0;
                for stretch in (0..ROWS).step_by(eighths) {
                    let end = stretch + eighths;
                    // The lines of C in the first half, so that they are there at the end, a few at a time.
                    for row in (2 * stretch).min(tile.rows)..(2 * end).min(tile.rows) {
                        for register in 0..REGISTERS {
                            let column = register * WIDE;
                            _mm_prefetch::<_MM_HINT_ET0>(tile.c.wrapping_add(row * tile.row_stride + column).cast());
                            if let Some((residual, stride)) = residual {
                                _mm_prefetch::<_MM_HINT_T0>(residual.wrapping_add(row * stride + column).cast());
                            }
                        }
                    }
                    tile.ahead.share(stretch..end, ROWS).ask();
                    let to = steps * end / ROWS;
                    for step in from..to {
                        let mut columns = [_mm512_setzero_si512(); REGISTERS];
                        for (register, column) in columns.iter_mut().enumerate() {
                            *column = _mm512_loadu_si512(b.add(register * WIDE).cast());
                        }
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let word = if ADJOINING_ROWS { *first.add(row) } else { *starts[row].add(step) };
                            let broadcast = _mm512_set1_epi32(word as i32);
                            for (sum, column) in sums.iter_mut().zip(columns) {
                                *sum = $multiply_add(*sum, broadcast, column);
                            }
                        }
                        first = first.wrapping_add(a.step_stride);
                        b = b.add(COLUMNS);
                    }
                    from = to;
                }
                let scale = _mm512_set1_ps(tile.scale);
                for (row, sums) in sums.iter().enumerate() {
                    if row == tile.rows {
                        break;
                    }
                    for (register, sum) in sums.iter().enumerate() {
                        // The tile's columns in this register.
                        let mask = (0xffff_ffffu32 >> (32 - (tile.columns - register * WIDE).min(WIDE))) as u16;
                        let c = tile.c.add(row * tile.row_stride + register * WIDE);
                        // No closures: what passes a vector through the standard library's functions goes by memory.
                        let value = match (tile.addend, tile.bias) {
                            (None, None) => _mm512_mul_ps(*sum, scale),
                            (Some((addend, stride)), None) => {
                                let addend = addend.add(row * stride + register * WIDE);
                                _mm512_fmadd_ps(*sum, scale, _mm512_maskz_loadu_ps(mask, addend))
                            }
                            (None, Some(bias)) => {
                                let bias = bias.add(register * WIDE);
                                _mm512_fmadd_ps(*sum, scale, _mm512_maskz_loadu_ps(mask, bias))
                            }
                            (Some((addend, stride)), Some(bias)) => {
                                let addend = addend.add(row * stride + register * WIDE);
                                let addend = _mm512_maskz_loadu_ps(mask, addend);
                                let bias = _mm512_maskz_loadu_ps(mask, bias.add(register * WIDE));
                                _mm512_fmadd_ps(*sum, scale, _mm512_add_ps(addend, bias))
                            }
                        };
                        if mask == 0xffff {
                            _mm512_storeu_ps(c, value);
                        } else {
                            _mm512_mask_storeu_ps(c, mask, value);
                        }
                    }
                }
            }
        }
    };
}

avx512_kernel!(
    /// Over pairs of bf16.
    avx512_bf16,
    avx512_bf16_sums,
    "avx512f,avx512bf16",
    |sum, a: __m512i, b: __m512i| {
        // The same bits under another name.
        let [a, b] = [a, b].map(|word| std::mem::transmute::<__m512i, __m512bh>(word));
        _mm512_dpbf16_ps(sum, a, b)
    }
);

avx512_kernel!(
    /// Over f32 words.
    avx512,
    avx512_sums,
    "avx512f",
    |sum, a: __m512i, b: __m512i| _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
);

/// Over f32 words with AVX2 and FMA: parts of 4 rows by 3 registers, as 16 registers allow.
///
/// # Safety
/// See [`super::tile::Kernel`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(steps: usize, a: Rows, b: *const u32, tile: &Tile) {
    tile.ahead.ask();
    const PART_ROWS: usize = 4;
    const REGISTERS: usize = 3;
    const PART_COLUMNS: usize = REGISTERS * HALF;
    for row in (0..tile.rows).step_by(PART_ROWS) {
        let starts: [_; PART_ROWS] = a.starts(row, tile.rows);
        for column in (0..tile.columns).step_by(PART_COLUMNS) {
            // SAFETY: rows and panel hold `steps` steps, and the tile may be written.
            unsafe {
                let mut b = b.add(column).cast::<f32>();
                let mut sums = [[_mm256_setzero_ps(); REGISTERS]; PART_ROWS];
                for step in 0..steps {
                    let columns = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(HALF)), _mm256_loadu_ps(b.add(2 * HALF))];
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let broadcast = _mm256_set1_ps(f32::from_bits(*starts[row].add(step * a.step_stride)));
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = _mm256_fmadd_ps(broadcast, column, *sum);
                        }
                    }
                    b = b.add(COLUMNS);
                }
                let mut numbers = [0.0f32; PART_ROWS * PART_COLUMNS];
                for (i, sum) in sums.as_flattened().iter().enumerate() {
                    _mm256_storeu_ps(numbers.as_mut_ptr().add(i * HALF), *sum);
                }
                tile.part(row, column, PART_ROWS, PART_COLUMNS).write(&numbers, PART_COLUMNS);
            }
        }
    }
}
