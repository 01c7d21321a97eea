//! Packing: operands copied into panels that a kernel reads front to back.
//!
//! A panel holds `width` lines (rows of A or columns of B) side by side: word `[step][line]`, where a word is one f32
//! or a pair of bf16 neighbours along the depth (the first one in the low half). Lines and depth beyond the matrix are
//! zeros, which add nothing to a sum.

use super::scratch::LINE;
use super::tile::Fetch;
use super::{Matrix, Operand};
use half::bf16;

/// Which part of an operand is packed into which panels. Its lines are the rows of A or of the transpose of B.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub first_line: usize,
    pub lines: usize,
    pub first_depth: usize,
    pub depth: usize,
    /// Lines in a panel, a multiple of 8.
    pub width: usize,
    /// Words from one panel to the next.
    pub panel_stride: usize,
}

impl Part {
    pub fn panels(&self) -> usize {
        self.lines.div_ceil(self.width)
    }
}

/// Words from one panel of `steps` steps to the next: a line more than its words, so that equal places of
/// neighbouring panels do not compete for one set of the first-level cache.
pub(super) fn panel_stride(steps: usize, width: usize) -> usize {
    (steps * width).next_multiple_of(LINE) + LINE
}

/// How numbers become words.
pub(super) trait Words {
    type Number: Copy + Default + Sync;
    /// Numbers along the depth in one word.
    const PER_WORD: usize;
    /// The word of a number and, where a word holds two, of its neighbour along the depth.
    fn word(first: Self::Number, second: Self::Number) -> u32;
}

/// f32 as it is.
pub(super) struct Exact;
/// f32 rounded to bf16 and widened again: bf16 products on the f32 kernels.
pub(super) struct Rounded;
/// bf16 widened to f32.
pub(super) struct Widened;
/// f32 rounded to bf16, in pairs.
pub(super) struct RoundedPairs;
/// bf16 in pairs.
pub(super) struct Pairs;

impl Words for Exact {
    type Number = f32;
    const PER_WORD: usize = 1;
    #[inline(always)]
    fn word(first: f32, _: f32) -> u32 {
        first.to_bits()
    }
}

impl Words for Rounded {
    type Number = f32;
    const PER_WORD: usize = 1;
    #[inline(always)]
    fn word(first: f32, _: f32) -> u32 {
        u32::from(bf16::from_f32(first).to_bits()) << 16
    }
}

impl Words for Widened {
    type Number = bf16;
    const PER_WORD: usize = 1;
    #[inline(always)]
    fn word(first: bf16, _: bf16) -> u32 {
        u32::from(first.to_bits()) << 16
    }
}

impl Words for RoundedPairs {
    type Number = f32;
    const PER_WORD: usize = 2;
    #[inline(always)]
    fn word(first: f32, second: f32) -> u32 {
        Pairs::word(bf16::from_f32(first), bf16::from_f32(second))
    }
}

impl Words for Pairs {
    type Number = bf16;
    const PER_WORD: usize = 2;
    #[inline(always)]
    fn word(first: bf16, second: bf16) -> u32 {
        u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
    }
}

/// Packs `part` of `from`, one word at a time.
pub(super) fn portable<W: Words>(from: Operand<W::Number>, part: Part, out: &mut [u32]) {
    let steps = part.depth.div_ceil(W::PER_WORD);
    for panel in 0..part.panels() {
        let words = &mut out[panel * part.panel_stride..][..steps * part.width];
        for line in 0..part.width {
            one_line::<W>(from, part, panel, line, 0..steps, words);
        }
    }
}

/// The words of `steps` of one line of a panel: zeros where the line is beyond the matrix.
pub(super) fn one_line<W: Words>(
    from: Operand<W::Number>,
    part: Part,
    panel: usize,
    line: usize,
    steps: std::ops::Range<usize>,
    words: &mut [u32],
) {
    let line_of_part = panel * part.width + line;
    if line_of_part >= part.lines {
        steps.for_each(|step| words[step * part.width + line] = 0);
        return;
    }
    let line_from = (part.first_line + line_of_part) * from.row_stride;
    let number = |depth: usize| from.data[line_from + (part.first_depth + depth) * from.column_stride];
    for step in steps {
        let depth = step * W::PER_WORD;
        let second = if depth + 1 < part.depth { number(depth + 1) } else { W::Number::default() };
        words[step * part.width + line] = W::word(number(depth), second);
    }
}

/// What packing `part` will read.
pub(super) fn ahead(from: Matrix, part: Part) -> Fetch {
    match from {
        Matrix::F32(from) => numbers_ahead(from, part),
        Matrix::Bf16(from) => numbers_ahead(from, part),
        Matrix::F16(from) => numbers_ahead(from, part),
        // A quarter of bf16's bytes, and widening them takes longer than memory does.
        Matrix::Nf4(_) => Fetch::NOTHING,
    }
}

fn numbers_ahead<N>(from: Operand<N>, part: Part) -> Fetch {
    let first =
        from.data.as_ptr().wrapping_add(part.first_line * from.row_stride + part.first_depth * from.column_stride);
    let (runs, run_stride, numbers, stride) = if from.row_stride < from.column_stride {
        (part.depth, from.column_stride, part.lines, from.row_stride)
    } else {
        (part.lines, from.row_stride, part.depth, from.column_stride)
    };
    Fetch::new(first.cast(), runs, run_stride * size_of::<N>(), numbers * stride * size_of::<N>())
}
