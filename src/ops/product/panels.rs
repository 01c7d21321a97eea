//! Operands packed once for many products of one thread: attention's, which are short and meet the same keys and values
//! block after block, and of which a part beyond the diagonal need not be computed.

use super::instructions::{Instructions, Word};
use super::pack::{Part, panel_stride};
use super::tile::{COLUMNS, Fetch, ROWS, Rows, Tile};
use super::{Into, Matrix, Operand, Precision};
use crate::ops::simd::{Level, Set};
use std::ops::Range;

/// Rows of A in one panel.
pub const PANEL_ROWS: usize = ROWS;
/// Columns of B in one panel.
pub const PANEL_COLUMNS: usize = COLUMNS;

/// Which operand of a product is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A, whose lines are its rows.
    A,
    /// B, whose lines are its columns: it is given as its transpose.
    B,
}

impl Side {
    fn width(self) -> usize {
        if self == Self::A { ROWS } else { COLUMNS }
    }
}

/// How products of one precision are packed and multiplied on this processor.
#[derive(Clone, Copy)]
pub struct Packing {
    instructions: Instructions,
    word: Word,
}

/// A packed operand of `lines` x `depth` numbers.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    packing: Packing,
    side: Side,
    words: &'a [u32],
    lines: usize,
    depth: usize,
    /// Strides of lines and of depth, where A is read as it lies.
    as_it_lies: Option<[usize; 2]>,
}

/// The part of a product's depth that is summed: `depth` numbers, which begin at different places of A and B.
///
/// Places are even. So is the depth, unless it ends where A's does: a word holds two numbers in bf16.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    pub of_a: usize,
    pub of_b: usize,
    pub depth: usize,
}

/// Words that an operand of `lines` x `depth` takes at most, whatever its precision.
pub fn panel_words(side: Side, lines: usize, depth: usize) -> usize {
    lines.div_ceil(side.width()) * panel_stride(depth, side.width())
}

impl Packing {
    /// With the instructions of `level`.
    pub fn new(level: Level, precision: Precision) -> Self {
        let instructions = match level.set() {
            Set::Portable => Instructions::Portable,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 if Instructions::Avx2.are_available() => Instructions::Avx2,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => Instructions::Portable,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => Instructions::best(),
        };
        Self { instructions, word: instructions.word(precision) }
    }

    fn steps(self, depth: usize) -> usize {
        depth.div_ceil(self.word.numbers())
    }

    /// Packs the first `lines` rows of `from`, `depth` numbers of each, into `words`.
    ///
    /// # Panics
    /// When `from` or `words` is too short ([`panel_words`] are enough).
    pub fn pack<'a>(self, side: Side, from: Matrix, lines: usize, depth: usize, words: &'a mut [u32]) -> Panels<'a> {
        assert!(from.covers(lines, depth), "an operand is shorter than {lines} x {depth}");
        let (width, stride) = (side.width(), panel_stride(self.steps(depth), side.width()));
        let words = &mut words[..lines.div_ceil(width) * stride];
        if lines > 0 && depth > 0 {
            let part = Part { first_line: 0, lines, first_depth: 0, depth, width, panel_stride: stride };
            self.instructions.pack(self.word, from, part, words);
        }
        Panels { packing: self, side, words, lines, depth, as_it_lies: None }
    }

    /// A, whose lines are the first `lines` rows of `from`: read as it lies where the kernels can, which is where its numbers
    /// are their words and its rows or its columns are contiguous; otherwise packed as by [`Self::pack`]. Products are the
    /// same, bit for bit.
    pub fn pack_if_needed<'a>(self, from: Matrix<'a>, lines: usize, depth: usize, words: &'a mut [u32]) -> Panels<'a> {
        if let (Word::Exact, Matrix::F32(Operand { data, row_stride, column_stride })) = (self.word, from) {
            // Of rows that adjoin the kernels read whole panels.
            let read = if row_stride == 1 { lines.next_multiple_of(ROWS) } else { lines };
            let contiguous = row_stride == 1 || column_stride == 1;
            if contiguous && from.covers(read, depth) {
                let (words, as_it_lies) = (bytemuck::cast_slice(data), Some([row_stride, column_stride]));
                return Panels { packing: self, side: Side::A, words, lines, depth, as_it_lies };
            }
        }
        self.pack(Side::A, from, lines, depth, words)
    }
}

impl Panels<'_> {
    /// C (+)= scale * A B for the rows of one panel of A and the `columns` of B, whose first one begins a panel. `c` begins
    /// with the first of those rows and columns.
    ///
    /// # Panics
    /// When the operands are not of one packing, a range leaves them or begins inside a panel or a word, or `c` is too short.
    #[allow(clippy::too_many_arguments, reason = "a product has this many operands")]
    pub fn multiply(
        self,
        panel: usize,
        b: Panels,
        columns: Range<usize>,
        depth: Depth,
        scale: f32,
        c: &mut [f32],
        c_row_stride: usize,
        into: Into,
    ) {
        let Packing { instructions, word } = self.packing;
        let Depth { of_a, of_b, depth } = depth;
        let alike = self.side == Side::A && b.side == Side::B && word == b.packing.word;
        assert!(alike && instructions == b.packing.instructions, "panels of different packings");
        assert!(of_a + depth <= self.depth && of_b + depth <= b.depth, "a depth beyond its panels");
        let even = |place: usize| place.is_multiple_of(2);
        let whole_words = even(of_a) && even(of_b) && (even(depth) || of_a + depth == self.depth);
        assert!(whole_words, "a depth that begins or ends inside a word");
        assert!(columns.start.is_multiple_of(COLUMNS) && columns.end <= b.lines, "columns beyond their panels");
        assert!(panel * ROWS < self.lines, "rows beyond their panels");
        if columns.is_empty() {
            return;
        }
        let rows = ROWS.min(self.lines - panel * ROWS);
        let width = columns.len();
        assert!(width <= c_row_stride && (rows - 1) * c_row_stride + width <= c.len(), "the result is too short");
        let (kernel, steps) = (instructions.kernel(word), self.packing.steps(depth));
        let line = |panels: &Panels, panel: usize, from: usize| {
            let (width, all) = (panels.side.width(), panels.packing.steps(panels.depth));
            panels.words[panel * panel_stride(all, width) + from / word.numbers() * width..].as_ptr()
        };
        let a = match self.as_it_lies {
            None => Rows::panel(line(&self, panel, of_a)),
            Some([row_stride, step_stride]) => {
                let first = self.words[panel * ROWS * row_stride + of_a * step_stride..].as_ptr();
                Rows { first, row_stride, step_stride }
            }
        };
        for first in (0..width).step_by(COLUMNS) {
            let c = c[first..].as_mut_ptr();
            let tile = Tile {
                c,
                row_stride: c_row_stride,
                rows,
                columns: COLUMNS.min(width - first),
                scale,
                addend: (into == Into::Accumulate).then_some((c.cast_const(), c_row_stride)),
                bias: None,
                ahead: Fetch::NOTHING,
            };
            // SAFETY: the assertions above keep the tile inside `c`, which is exclusive, and the steps inside the panels;
            // `Packing::new` asked the processor for the instructions.
            unsafe { kernel(steps, a, line(&b, (columns.start + first) / COLUMNS, of_b), &tile) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::product::Operand;
    use crate::ops::testing::*;
    use half::bf16;

    #[test]
    fn parts_of_packed_operands_multiply_as_parts_of_the_matrices() {
        let (m, k, n) = (21, 45, 130);
        let (a, b) = (normal(1, m * k), normal(2, n * k));
        let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
        let exact = |x: f32| f64::from(x);
        for instructions in Instructions::available() {
            for precision in [Precision::F32, Precision::Bf16] {
                let packing = Packing { instructions, word: instructions.word(precision) };
                let number = |x| if precision == Precision::F32 { exact(x) } else { round(x) };
                let mut words = [0xffff_ffff; 2].map(|nan| vec![nan; panel_words(Side::B, n, k)]);
                let [a_words, b_words] = &mut words;
                let pa = packing.pack(Side::A, Operand::row_major(&a, k).into(), m, k, a_words);
                let pb = packing.pack(Side::B, Operand::row_major(&b, k).into(), n, k, b_words);
                for (panel, columns, depth, into) in [
                    (0, 0..n, Depth { of_a: 0, of_b: 0, depth: k }, Into::Overwrite),
                    (2, 48..101, Depth { of_a: 4, of_b: 2, depth: 41 }, Into::Accumulate),
                    (1, 96..97, Depth { of_a: 44, of_b: 0, depth: 1 }, Into::Overwrite),
                    (1, 0..50, Depth { of_a: 0, of_b: 44, depth: 0 }, Into::Overwrite),
                ] {
                    let rows = 8.min(m - panel * 8);
                    let stride = columns.len() + 3;
                    let mut c = vec![7.0f32; rows * stride];
                    pa.multiply(panel, pb, columns.clone(), depth, 0.5, &mut c, stride, into);
                    for (place, &found) in c.iter().enumerate() {
                        let (row, column) = (panel * 8 + place / stride, columns.start + place % stride);
                        let product = |i| number(a[row * k + depth.of_a + i]) * number(b[column * k + depth.of_b + i]);
                        let before = if into == Into::Accumulate { 7.0 } else { 0.0 };
                        let expected = if column < columns.end {
                            before + 0.5 * (0..depth.depth).map(product).sum::<f64>()
                        } else {
                            7.0
                        };
                        let name = format!("{instructions:?} {precision:?} {columns:?} {depth:?} at {row}, {column}");
                        assert!((f64::from(found) - expected).abs() < 2e-5, "{name}: {found} is not {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_and_columns_read_as_they_lie_give_the_bits_of_packed_ones() {
        let (m, k, n) = (21, 45, 64);
        let numbers = normal(1, 24 * 48);
        let b = normal(2, n * k);
        // Rows of 48 numbers, columns of 24: what stands beyond the operand is not its own, and must not matter.
        let rows = Operand { data: &numbers[..], row_stride: 48, column_stride: 1 };
        let columns = Operand { data: &numbers[..], row_stride: 1, column_stride: 24 };
        let too_short = Operand { data: &numbers[..(k - 1) * 24 + m], ..columns };
        for instructions in Instructions::available() {
            for (a, precision, in_place) in [
                (rows, Precision::F32, true),
                (columns, Precision::F32, true),
                (too_short, Precision::F32, false),
                (rows, Precision::Bf16, false),
            ] {
                let packing = Packing { instructions, word: instructions.word(precision) };
                let mut words = [m, n].map(|lines| vec![0; panel_words(Side::B, lines, k)]);
                let [packed_words, b_words] = &mut words;
                let b = packing.pack(Side::B, Operand::row_major(&b, k).into(), n, k, b_words);
                let packed = packing.pack(Side::A, a.into(), m, k, packed_words);
                let mut words = vec![0; panel_words(Side::A, m, k)];
                let as_it_lies = packing.pack_if_needed(a.into(), m, k, &mut words);
                assert_eq!(as_it_lies.as_it_lies.is_some(), in_place, "{instructions:?} {precision:?}");
                for (panel, of_a, depth) in [(0, 0, 45), (2, 2, 43), (1, 4, 12)] {
                    let depth = Depth { of_a, of_b: 0, depth };
                    let [expected, found] = [packed, as_it_lies].map(|a| {
                        let mut c = vec![7.0f32; 8 * n];
                        a.multiply(panel, b, 0..n, depth, 0.5, &mut c, n, Into::Accumulate);
                        c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                    });
                    assert_eq!(expected, found, "{instructions:?} {precision:?} panel {panel}, {depth:?}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "a depth beyond its panels")]
    fn more_depth_than_was_packed_is_refused() {
        let packing = Packing::new(Level::current(), Precision::F32);
        let (numbers, mut words) = ([0.0; 64], [vec![0; 600], vec![0; 600]]);
        let [a, b] = &mut words;
        let a = packing.pack(Side::A, Operand::row_major(&numbers, 8).into(), 8, 8, a);
        let b = packing.pack(Side::B, Operand::row_major(&numbers, 8).into(), 8, 8, b);
        a.multiply(0, b, 0..8, Depth { of_a: 2, of_b: 0, depth: 8 }, 1.0, &mut [0.0; 64], 8, Into::Overwrite);
    }
}
