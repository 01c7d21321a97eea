//! Where queries, keys and values stand, and the pieces that scratch is cut into.

use crate::ops::attention::{BLOCK, Inputs, Shape};
use crate::ops::dropout::{self, Mask};
use crate::ops::product::{Depth, Matrix, Operand, PANEL_COLUMNS, PANEL_ROWS, Panels, Precision, Side, panel_words};
use crate::ops::simd::{LANES, Level};
use crate::ops::{Into, Values};
use std::ops::Range;

/// One of q, k, v: rows of `row_stride`, of which this operand has the columns from `column` on.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    data: Values<'a>,
    row_stride: usize,
    column: usize,
}

impl<'a> Part<'a> {
    /// The rows from `row` on, of them the columns from `column` on.
    pub fn rows(&self, row: usize, column: usize) -> Matrix<'a> {
        let from = row * self.row_stride + self.column + column;
        match self.data {
            Values::F32(data) => Operand::row_major(&data[from..], self.row_stride).into(),
            Values::Bf16(data) => Operand::row_major(&data[from..], self.row_stride).into(),
        }
    }
}

/// What the operands of the products are rounded to.
pub fn precision(inputs: &[Part; 3]) -> Precision {
    let bf16 = inputs.iter().all(|part| matches!(part.data, Values::Bf16(_)));
    if bf16 { Precision::Bf16 } else { Precision::F32 }
}

/// q, k and v of `inputs`.
pub fn parts(shape: Shape, inputs: Inputs) -> [Part; 3] {
    let (rows, q_width, kv_width) = (shape.rows(), shape.q_width(), shape.kv_width());
    match inputs {
        Inputs::Fused(data) => {
            let row_stride = q_width + 2 * kv_width;
            assert_eq!(data.len(), rows * row_stride, "attention: the fused q, k, v are not [B*T, q + k + v]");
            [0, q_width, q_width + kv_width].map(|column| Part { data, row_stride, column })
        }
        Inputs::Separate { q, k, v } => {
            let fit = q.len() == rows * q_width && k.len() == rows * kv_width && v.len() == k.len();
            assert!(fit, "attention: q, k or v are not [B*T, heads * head_dim]");
            let part = |data, row_stride| Part { data, row_stride, column: 0 };
            [part(q, q_width), part(k, kv_width), part(v, kv_width)]
        }
    }
}

/// A block of query rows, and the keys that it needs: those up to its last row, from the panel on in which the document of
/// its first row begins.
pub struct Block {
    pub first: usize,
    pub rows: usize,
    pub from_key: usize,
}

impl Block {
    /// `places` are the rows' places in their documents (none: the row is one document).
    pub fn new(shape: Shape, first: usize, places: &[u32]) -> Self {
        let start = places.first().map_or(0, |&place| first - place as usize);
        Self { first, rows: rows_of(shape, first), from_key: start / PANEL_COLUMNS * PANEL_COLUMNS }
    }

    /// Keys that the block needs.
    pub fn columns(&self) -> usize {
        self.first + self.rows - self.from_key
    }

    /// The panels of the block's rows: the place of the first row, and the keys that the panel's rows need.
    fn panels(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        (0..self.rows)
            .step_by(PANEL_ROWS)
            .map(|row| (row, self.from_key..self.first + (row + PANEL_ROWS).min(self.rows)))
    }

    /// scores (rows of `stride`, columns from `from_key` on) = scale * rows . keys, for the keys that each panel's rows
    /// need: `rows` [rows, head_dim] and `keys` [T, head_dim] are packed with their heads as depth.
    pub fn scores(&self, rows: Panels, keys: Panels, head_dim: usize, scale: f32, scores: &mut [f32], stride: usize) {
        let depth = Depth { of_a: 0, of_b: 0, depth: head_dim };
        for (row, seen) in self.panels() {
            rows.multiply(
                row / PANEL_ROWS,
                keys,
                seen,
                depth,
                scale,
                &mut scores[row * stride..],
                stride,
                Into::Overwrite,
            );
        }
    }

    /// results [rows, head_dim] = scale * weights . values: `weights` are packed rows of the block, whose depth begins at
    /// `from_key` and which are 0 where a row sees no key; `values` are packed with all keys as depth.
    pub fn mix(&self, weights: Panels, values: Panels, head_dim: usize, scale: f32, results: &mut [f32]) {
        for (row, seen) in self.panels() {
            let depth = Depth { of_a: 0, of_b: self.from_key, depth: seen.len() };
            let results = &mut results[row * head_dim..];
            weights.multiply(row / PANEL_ROWS, values, 0..head_dim, depth, scale, results, head_dim, Into::Overwrite);
        }
    }

    /// The panels of its keys: the place of the first key after `from_key`, and the first of the block's rows that sees one
    /// of them, rounded down to an even one.
    pub fn key_panels(&self) -> impl Iterator<Item = (usize, usize)> {
        let before = self.first - self.from_key;
        (0..self.columns()).step_by(PANEL_ROWS).map(move |key| (key, key.saturating_sub(before) / 2 * 2))
    }
}

/// Rows of the block that begins at `first`.
pub fn rows_of(shape: Shape, first: usize) -> usize {
    BLOCK.min(shape.sequence - first)
}

/// Elements between rows of a block of scores: an odd number of registers, so that equal columns of its rows do not compete
/// for one set of the first-level cache.
pub fn score_stride(shape: Shape) -> usize {
    (shape.sequence.div_ceil(LANES) | 1) * LANES
}

/// Puts a block of rows, of which the first one is row `query` of the mask and has the keys from `from_key` on, under
/// the mask.
pub fn drop_probabilities(
    level: Level,
    mask: Mask,
    query: usize,
    from_key: usize,
    columns: usize,
    stride: usize,
    rows: &mut [f32],
) {
    for (row, numbers) in rows.chunks_exact_mut(stride).enumerate() {
        dropout::columns(level, mask, query + row, from_key, &mut numbers[..columns]);
    }
}

/// Words of the panels of all keys (or values) of a head: as lines, and as the depth of a product.
pub fn key_words(shape: Shape) -> [usize; 2] {
    let Shape { sequence, head_dim, .. } = shape;
    [panel_words(Side::B, sequence, head_dim), panel_words(Side::B, head_dim, sequence)]
}

/// Cuts `words` off scratch, as words of panels; they are whole cache lines.
pub fn cut_words<'a>(scratch: &mut &'a mut [f32], words: usize) -> &'a mut [u32] {
    bytemuck::cast_slice_mut(cut(scratch, words))
}

/// Cuts `numbers` off scratch, and what is left of their last cache line.
pub fn cut<'a>(scratch: &mut &'a mut [f32], numbers: usize) -> &'a mut [f32] {
    let (part, rest) = std::mem::take(scratch).split_at_mut(numbers.next_multiple_of(LANES));
    *scratch = rest;
    &mut part[..numbers]
}
