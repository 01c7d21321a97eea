//! Packing with vectors: sixteen words at a time with AVX-512, eight with AVX2, whichever way the operand lies.

use super::Operand;
use super::pack::{Exact, Pairs, Part, Rounded, RoundedPairs, Widened, Words, one_line};
use half::bf16;
use std::arch::x86_64::*;

/// Loads of eight and of sixteen words. Callers have the instructions that the implementation uses.
pub(super) trait VectorWords: Words {
    /// Words of eight neighbouring steps of one line whose depth is contiguous.
    unsafe fn along_depth(from: *const Self::Number) -> __m256i;
    /// Words of one step for eight neighbouring lines; `second` is where the second numbers of pairs begin, if any.
    unsafe fn along_lines(from: *const Self::Number, second: Option<*const Self::Number>) -> __m256i;
    /// As [`Self::along_depth`], of sixteen steps.
    unsafe fn along_depth_wide(from: *const Self::Number) -> __m512i;
    /// As [`Self::along_lines`], of sixteen lines.
    unsafe fn along_lines_wide(from: *const Self::Number, second: Option<*const Self::Number>) -> __m512i;
}

/// The wide loads of f32 words.
macro_rules! wide_singles {
    ($load:expr) => {
        #[inline(always)]
        unsafe fn along_depth_wide(from: *const Self::Number) -> __m512i {
            // SAFETY: the caller vouches for sixteen numbers at `from` and for AVX-512.
            unsafe { $load(from) }
        }
        #[inline(always)]
        unsafe fn along_lines_wide(from: *const Self::Number, _: Option<*const Self::Number>) -> __m512i {
            // SAFETY: as above.
            unsafe { $load(from) }
        }
    };
}

impl VectorWords for Exact {
    #[inline(always)]
    unsafe fn along_depth(from: *const f32) -> __m256i {
        // SAFETY: the caller vouches for eight numbers at `from`.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn along_lines(from: *const f32, _: Option<*const f32>) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    wide_singles!(|from: *const f32| _mm512_loadu_si512(from.cast()));
}

impl VectorWords for Rounded {
    #[inline(always)]
    unsafe fn along_depth(from: *const f32) -> __m256i {
        // SAFETY: the caller vouches for eight numbers at `from`.
        unsafe { round(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn along_lines(from: *const f32, _: Option<*const f32>) -> __m256i {
        // SAFETY: as above.
        unsafe { round(_mm256_loadu_si256(from.cast())) }
    }
    wide_singles!(|from: *const f32| {
        let halves = [from, from.add(EIGHT)].map(|from| round(_mm256_loadu_si256(from.cast())));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(halves[0]), halves[1])
    });
}

/// Eight f32 rounded to bf16's precision, nearest even; a NaN stays one.
#[inline(always)]
unsafe fn round(bits: __m256i) -> __m256i {
    // SAFETY: register arithmetic; the caller has AVX2.
    unsafe {
        let odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let value = _mm256_castsi256_ps(bits);
        let nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_set1_epi32(0xffff_0000u32 as i32))
    }
}

impl VectorWords for Widened {
    #[inline(always)]
    unsafe fn along_depth(from: *const bf16) -> __m256i {
        // SAFETY: the caller vouches for eight numbers at `from`.
        unsafe { _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())), 16) }
    }
    #[inline(always)]
    unsafe fn along_lines(from: *const bf16, _: Option<*const bf16>) -> __m256i {
        // SAFETY: as above.
        unsafe { Self::along_depth(from) }
    }
    wide_singles!(|from: *const bf16| {
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))
    });
}

impl VectorWords for RoundedPairs {
    #[inline(always)]
    unsafe fn along_depth(from: *const f32) -> __m256i {
        // SAFETY: the caller vouches for sixteen numbers at `from`; __m256bh and __m256i are the same bits.
        unsafe { std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(from))) }
    }
    #[inline(always)]
    unsafe fn along_lines(from: *const f32, second: Option<*const f32>) -> __m256i {
        // SAFETY: the caller vouches for eight numbers at each pointer; __m128bh and __m128i are the same bits.
        unsafe {
            let narrow = |from: *const f32| {
                let bits: __m128i = std::mem::transmute(_mm256_cvtneps_pbh(_mm256_loadu_ps(from)));
                _mm256_cvtepu16_epi32(bits)
            };
            pair(narrow(from), second.map(narrow))
        }
    }
    #[inline(always)]
    unsafe fn along_depth_wide(from: *const f32) -> __m512i {
        // SAFETY: the caller vouches for thirty-two numbers at `from`; __m512bh and __m512i are the same bits.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from.add(SIXTEEN)), _mm512_loadu_ps(from))) }
    }
    #[inline(always)]
    unsafe fn along_lines_wide(from: *const f32, second: Option<*const f32>) -> __m512i {
        // SAFETY: the caller vouches for sixteen numbers at each pointer; as above.
        unsafe {
            let second = second.map_or(_mm512_setzero_ps(), |second| _mm512_loadu_ps(second));
            let bits: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, _mm512_loadu_ps(from)));
            _mm512_permutexvar_epi16(interleaving(), bits)
        }
    }
}

impl VectorWords for Pairs {
    #[inline(always)]
    unsafe fn along_depth(from: *const bf16) -> __m256i {
        // SAFETY: the caller vouches for sixteen numbers at `from`.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn along_lines(from: *const bf16, second: Option<*const bf16>) -> __m256i {
        // SAFETY: the caller vouches for eight numbers at each pointer.
        unsafe {
            let load = |from: *const bf16| _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            pair(load(from), second.map(load))
        }
    }
    #[inline(always)]
    unsafe fn along_depth_wide(from: *const bf16) -> __m512i {
        // SAFETY: the caller vouches for thirty-two numbers at `from`.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn along_lines_wide(from: *const bf16, second: Option<*const bf16>) -> __m512i {
        // SAFETY: the caller vouches for sixteen numbers at each pointer.
        unsafe {
            let load = |from: *const bf16| _mm256_loadu_si256(from.cast());
            let both = _mm512_castsi256_si512(load(from));
            let both = _mm512_inserti64x4::<1>(both, second.map_or(_mm256_setzero_si256(), load));
            _mm512_permutexvar_epi16(interleaving(), both)
        }
    }
}

/// Where the halves of sixteen pairs come from: the first ones from the low half of a register, the second ones from its
/// high half.
#[inline(always)]
unsafe fn interleaving() -> __m512i {
    const PLACES: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        places
    };
    // SAFETY: a load of a constant; the caller has AVX-512.
    unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) }
}

#[inline(always)]
unsafe fn pair(low: __m256i, high: Option<__m256i>) -> __m256i {
    match high {
        // SAFETY: register arithmetic; the caller has AVX2.
        Some(high) => unsafe { _mm256_or_si256(low, _mm256_slli_epi32(high, 16)) },
        None => low,
    }
}

/// Packs f32 words.
///
/// # Safety
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn avx2<W: VectorWords>(from: Operand<W::Number>, part: Part, out: &mut [u32]) {
    // SAFETY: the caller vouches for the instructions.
    unsafe { pack::<W, false>(from, part, out) }
}

/// Packs f32 words.
///
/// # Safety
/// The processor has AVX2 and AVX512-F.
#[target_feature(enable = "avx2,avx512f")]
pub(super) unsafe fn avx512<W: VectorWords>(from: Operand<W::Number>, part: Part, out: &mut [u32]) {
    // SAFETY: the caller vouches for the instructions.
    unsafe { pack::<W, true>(from, part, out) }
}

/// Packs pairs of bf16.
///
/// # Safety
/// The processor has AVX512-F, -VL, -BW and -BF16.
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw,avx512bf16")]
pub(super) unsafe fn avx512_bf16<W: VectorWords>(from: Operand<W::Number>, part: Part, out: &mut [u32]) {
    // SAFETY: the caller vouches for the instructions.
    unsafe { pack::<W, true>(from, part, out) }
}

/// Lines handled at once, and with AVX-512.
const EIGHT: usize = 8;
const SIXTEEN: usize = 16;
/// Steps ahead of which rows that are far apart are fetched.
const AHEAD: usize = 6;

/// Packs with registers of sixteen words where `WIDE`, and what that leaves with registers of eight.
#[inline(always)]
unsafe fn pack<W: VectorWords, const WIDE: bool>(from: Operand<W::Number>, part: Part, out: &mut [u32]) {
    let steps = part.depth.div_ceil(W::PER_WORD);
    let last_line = (part.first_line + part.lines - 1) * from.row_stride;
    let last_depth = (part.first_depth + part.depth - 1) * from.column_stride;
    assert!(last_line + last_depth < from.data.len(), "packing beyond the operand");
    assert!((part.panels() - 1) * part.panel_stride + steps * part.width <= out.len(), "packing beyond the buffer");
    let vector_lines = part.lines / EIGHT * EIGHT;
    let vector_steps = if from.row_stride == 1 {
        // SAFETY: the assertions above.
        unsafe { contiguous_lines::<W, WIDE>(from, part, vector_lines, out) }
        steps
    } else if from.column_stride == 1 {
        let (wide_lines, wide_steps) = if WIDE {
            (part.lines / SIXTEEN * SIXTEEN, part.depth / (W::PER_WORD * SIXTEEN) * SIXTEEN)
        } else {
            (0, 0)
        };
        let steps = part.depth / (W::PER_WORD * EIGHT) * EIGHT;
        // SAFETY: the assertions above.
        unsafe {
            if WIDE {
                contiguous_depth_wide::<W>(from, part, wide_lines, wide_steps, out);
            }
            contiguous_depth::<W>(from, part, 0..wide_lines, wide_steps..steps, out);
            contiguous_depth::<W>(from, part, wide_lines..vector_lines, 0..steps, out);
        }
        steps
    } else {
        0
    };
    for panel in 0..part.panels() {
        let words = &mut out[panel * part.panel_stride..][..steps * part.width];
        let lines = part.width.min(part.lines - panel * part.width);
        for line in 0..lines {
            let done = if panel * part.width + line < vector_lines { vector_steps } else { 0 };
            one_line::<W>(from, part, panel, line, done..steps, words);
        }
        if lines < part.width {
            words.chunks_exact_mut(part.width).for_each(|step| step[lines..].fill(0));
        }
    }
}

/// Where the words of `line` stand in the panels, in step 0.
#[inline(always)]
fn place(part: Part, line: usize) -> usize {
    line / part.width * part.panel_stride + line % part.width
}

/// Stores sixteen neighbouring lines' words of one step: `places` are those of the first and of the ninth line.
#[inline(always)]
unsafe fn store_wide(out: *mut u32, places: [usize; 2], words: __m512i) {
    // SAFETY: the caller vouches for both places and has AVX-512.
    unsafe {
        if places[1] == places[0] + EIGHT {
            _mm512_storeu_si512(out.add(places[0]).cast(), words);
        } else {
            _mm256_storeu_si256(out.add(places[0]).cast(), _mm512_castsi512_si256(words));
            _mm256_storeu_si256(out.add(places[1]).cast(), _mm512_extracti64x4_epi64::<1>(words));
        }
    }
}

/// Lines side by side in memory: a step at a time over all panels, so that memory is read in long runs.
#[inline(always)]
unsafe fn contiguous_lines<W: VectorWords, const WIDE: bool>(
    from: Operand<W::Number>,
    part: Part,
    lines: usize,
    out: &mut [u32],
) {
    // SAFETY: `pack` asserted that the part lies inside the operand and its panels inside the buffer.
    unsafe {
        let first = from.data.as_ptr().add(part.first_line + part.first_depth * from.column_stride);
        for step in 0..part.depth.div_ceil(W::PER_WORD) {
            let depth = step * W::PER_WORD;
            let row = first.add(depth * from.column_stride);
            for ahead in 0..W::PER_WORD {
                let row = row.wrapping_add((AHEAD * W::PER_WORD + ahead) * from.column_stride);
                for line in (0..part.lines).step_by(64 / size_of::<W::Number>()) {
                    _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(line).cast());
                }
            }
            let second = (depth + 1 < part.depth).then(|| row.add(from.column_stride));
            let words = out.as_mut_ptr().add(step * part.width);
            let mut line = 0;
            // The place of `line`, and how many lines its panel still has.
            let (mut place, mut left) = (0, part.width);
            while line < lines {
                if left == 0 {
                    (place, left) = (place - part.width + part.panel_stride, part.width);
                }
                let second = second.map(|second| second.add(line));
                if WIDE && line + SIXTEEN <= lines && left != EIGHT {
                    _mm512_storeu_si512(words.add(place).cast(), W::along_lines_wide(row.add(line), second));
                    (line, place, left) = (line + SIXTEEN, place + SIXTEEN, left - SIXTEEN);
                } else if WIDE && line + SIXTEEN <= lines && part.width == EIGHT {
                    let next = place + part.panel_stride;
                    store_wide(words, [place, next], W::along_lines_wide(row.add(line), second));
                    (line, place, left) = (line + SIXTEEN, next + EIGHT, 0);
                } else {
                    _mm256_storeu_si256(words.add(place).cast(), W::along_lines(row.add(line), second));
                    (line, place, left) = (line + EIGHT, place + EIGHT, left - EIGHT);
                }
            }
        }
    }
}

/// Depth contiguous in memory: blocks of eight lines by eight steps, transposed in registers.
#[inline(always)]
unsafe fn contiguous_depth<W: VectorWords>(
    from: Operand<W::Number>,
    part: Part,
    lines: std::ops::Range<usize>,
    steps: std::ops::Range<usize>,
    out: &mut [u32],
) {
    // SAFETY: `pack` asserted that the part lies inside the operand and its panels inside the buffer.
    unsafe {
        let wide = if part.width.is_multiple_of(2 * EIGHT) { 2 * EIGHT } else { EIGHT };
        for band in lines.clone().step_by(wide) {
            for step in steps.clone().step_by(EIGHT) {
                for line in (band..lines.end.min(band + wide)).step_by(EIGHT) {
                    let line_from =
                        from.data.as_ptr().add((part.first_line + line) * from.row_stride + part.first_depth);
                    let words = out.as_mut_ptr().add(place(part, line));
                    let mut block = [_mm256_setzero_si256(); EIGHT];
                    for (i, row) in block.iter_mut().enumerate() {
                        *row = W::along_depth(line_from.add(i * from.row_stride + step * W::PER_WORD));
                    }
                    for (i, row) in transpose(block).into_iter().enumerate() {
                        _mm256_storeu_si256(words.add((step + i) * part.width).cast(), row);
                    }
                }
            }
        }
    }
}

/// As [`contiguous_depth`], in blocks of sixteen by sixteen.
#[inline(always)]
unsafe fn contiguous_depth_wide<W: VectorWords>(
    from: Operand<W::Number>,
    part: Part,
    lines: usize,
    steps: usize,
    out: &mut [u32],
) {
    // SAFETY: `pack` asserted that the part lies inside the operand and its panels inside the buffer.
    unsafe {
        for line in (0..lines).step_by(SIXTEEN) {
            let line_from = from.data.as_ptr().add((part.first_line + line) * from.row_stride + part.first_depth);
            let places = [place(part, line), place(part, line + EIGHT)];
            for step in (0..steps).step_by(SIXTEEN) {
                let mut block = [_mm512_setzero_si512(); SIXTEEN];
                for (i, row) in block.iter_mut().enumerate() {
                    *row = W::along_depth_wide(line_from.add(i * from.row_stride + step * W::PER_WORD));
                }
                for (i, row) in transpose_wide(block).into_iter().enumerate() {
                    store_wide(out.as_mut_ptr().add((step + i) * part.width), places, row);
                }
            }
        }
    }
}

/// The transpose of 8 x 8 words.
#[inline(always)]
unsafe fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: register arithmetic; the caller has AVX2.
    unsafe {
        // Words of two rows interleaved, then pairs of words of four rows, then the 128-bit halves of eight.
        let low = |i: usize| _mm256_unpacklo_epi32(r[i], r[i + 1]);
        let high = |i: usize| _mm256_unpackhi_epi32(r[i], r[i + 1]);
        let quarter =
            |top: __m256i, bottom: __m256i| [_mm256_unpacklo_epi64(top, bottom), _mm256_unpackhi_epi64(top, bottom)];
        let [top0, top1] = quarter(low(0), low(2));
        let [top2, top3] = quarter(high(0), high(2));
        let [bottom0, bottom1] = quarter(low(4), low(6));
        let [bottom2, bottom3] = quarter(high(4), high(6));
        [
            _mm256_permute2x128_si256::<0x20>(top0, bottom0),
            _mm256_permute2x128_si256::<0x20>(top1, bottom1),
            _mm256_permute2x128_si256::<0x20>(top2, bottom2),
            _mm256_permute2x128_si256::<0x20>(top3, bottom3),
            _mm256_permute2x128_si256::<0x31>(top0, bottom0),
            _mm256_permute2x128_si256::<0x31>(top1, bottom1),
            _mm256_permute2x128_si256::<0x31>(top2, bottom2),
            _mm256_permute2x128_si256::<0x31>(top3, bottom3),
        ]
    }
}

/// The transpose of 16 x 16 words.
#[inline(always)]
unsafe fn transpose_wide(r: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: register arithmetic; the caller has AVX-512.
    unsafe {
        // As above within each quarter of the registers: word i of four rows in quarter i / 4.
        let quarters = |i: usize| {
            let [low0, low1] = [_mm512_unpacklo_epi32(r[i], r[i + 1]), _mm512_unpacklo_epi32(r[i + 2], r[i + 3])];
            let [high0, high1] = [_mm512_unpackhi_epi32(r[i], r[i + 1]), _mm512_unpackhi_epi32(r[i + 2], r[i + 3])];
            [
                _mm512_unpacklo_epi64(low0, low1),
                _mm512_unpackhi_epi64(low0, low1),
                _mm512_unpacklo_epi64(high0, high1),
                _mm512_unpackhi_epi64(high0, high1),
            ]
        };
        let rows = [quarters(0), quarters(4), quarters(8), quarters(12)];
        let mut transposed = [_mm512_setzero_si512(); 16];
        for i in 0..4 {
            // Quarters 0 and 2, then 1 and 3, of the upper eight rows and of the lower eight.
            let even = |top: usize| _mm512_shuffle_i32x4::<0x88>(rows[top][i], rows[top + 1][i]);
            let odd = |top: usize| _mm512_shuffle_i32x4::<0xdd>(rows[top][i], rows[top + 1][i]);
            transposed[i] = _mm512_shuffle_i32x4::<0x88>(even(0), even(2));
            transposed[i + 4] = _mm512_shuffle_i32x4::<0x88>(odd(0), odd(2));
            transposed[i + 8] = _mm512_shuffle_i32x4::<0xdd>(even(0), even(2));
            transposed[i + 12] = _mm512_shuffle_i32x4::<0xdd>(odd(0), odd(2));
        }
        transposed
    }
}
