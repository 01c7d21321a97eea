//! Where queries, keys and values stand, and bringing them together in scratch.

use crate::ops::attention::{Inputs, Shape};
use crate::ops::dropout::{self, Mask};
use crate::ops::product::{Matrix, Operand, Operand16, Precision, Size, Threads, multiply_in};
use crate::ops::simd::{LANES, Level, kernel};
use crate::ops::values::each_kind;
use crate::ops::{Into, Values};

/// One of q, k, v: rows of `row_stride`, of which this operand has the columns from `column` on.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    data: Values<'a>,
    row_stride: usize,
    column: usize,
}

impl<'a> Part<'a> {
    /// The rows from `row` on, of them the columns from `column` on, as they stand: for products in bf16, which pack them
    /// from there.
    pub fn bf16(&self, row: usize, column: usize) -> Option<Operand16<'a>> {
        let Values::Bf16(data) = self.data else { return None };
        let from = row * self.row_stride + self.column + column;
        Some(Operand { data: &data[from..], row_stride: self.row_stride, column_stride: 1 })
    }

    /// to [rows, width] = scale * the rows from `row` on, of them the columns from `column` on.
    pub fn copy(&self, level: Level, row: usize, column: usize, scale: f32, width: usize, to: &mut [f32]) {
        let from = row * self.row_stride + self.column + column;
        each_kind!(Values, self.data, data => copy_rows(level, &data[from..], self.row_stride, scale, width, to));
    }

    /// to [columns, rows] (rows of `to_stride`) = the transpose of [rows, columns] from (`row`, `column`) on.
    pub fn transpose(
        &self,
        level: Level,
        (row, column): (usize, usize),
        (rows, columns): (usize, usize),
        to: &mut [f32],
        to_stride: usize,
    ) {
        let from = row * self.row_stride + self.column + column;
        each_kind!(Values, self.data, data => {
            transpose(level, &data[from..], self.row_stride, rows, columns, to, to_stride);
        });
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

/// The first key that a block of query rows needs: the beginning of the first row's document, rounded down to a whole
/// register. `places` are the rows' places in their documents (none: the row is one document).
pub fn first_key(first: usize, places: &[u32]) -> usize {
    places.first().map_or(0, |&place| (first - place as usize) / LANES * LANES)
}

/// Elements between rows of a block of scores: whole registers.
pub fn score_stride(shape: Shape) -> usize {
    shape.sequence.next_multiple_of(LANES)
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

/// The first `used` elements of the first `reserved` ones, and what comes after those.
pub fn split(buffer: &mut [f32], reserved: usize, used: usize) -> [&mut [f32]; 2] {
    let (first, rest) = buffer.split_at_mut(reserved);
    [&mut first[..used], rest]
}

/// The rows of `direct` from `first` on, or those of `copied` [.., head_dim].
pub fn rows_from<'a>(direct: Option<Operand16<'a>>, copied: &'a [f32], head_dim: usize, first: usize) -> Matrix<'a> {
    match direct {
        Some(rows) => Operand { data: &rows.data[first * rows.row_stride..], ..rows }.into(),
        None => Operand::row_major(&copied[first * head_dim..], head_dim).into(),
    }
}

/// As [`rows_from`], transposed: `copied` is [head_dim, ..] with rows of `stride`.
pub fn columns_from<'a>(direct: Option<Operand16<'a>>, copied: &'a [f32], stride: usize, first: usize) -> Matrix<'a> {
    match direct {
        Some(_) => rows_from(direct, &[], 0, first).transposed(),
        None => Operand::row_major(&copied[first..], stride).into(),
    }
}

/// c = scale * a b on this thread.
pub fn product<'a>(
    precision: Precision,
    size: Size,
    a: impl std::convert::Into<Matrix<'a>>,
    b: impl std::convert::Into<Matrix<'a>>,
    scale: f32,
    c: &mut [f32],
    stride: usize,
) {
    multiply_in(precision, Threads::One, size, a, b, scale, c, stride, Into::Overwrite);
}

kernel! {
    /// to [rows, width] = scale * rows of `stride`.
    pub fn copy_rows<N>(from: &[N], stride: usize, scale: f32, width: usize, to: &mut [f32]) {
        for (row, to) in to.chunks_exact_mut(width).enumerate() {
            for (to, from) in to.iter_mut().zip(&from[row * stride..][..width]) {
                *to = scale * from.widen();
            }
        }
    }
}

kernel! {
    /// to [columns, rows] (rows of `to_stride`) = the transpose of from [rows, columns] (rows of `stride`).
    fn transpose<N>(from: &[N], stride: usize, rows: usize, columns: usize, to: &mut [f32], to_stride: usize) {
        for first in (0..rows).step_by(LANES) {
            let height = LANES.min(rows - first);
            for column in 0..columns {
                let source = &from[first * stride + column..];
                let target = &mut to[column * to_stride + first..][..height];
                for (row, target) in target.iter_mut().enumerate() {
                    *target = source[row * stride].widen();
                }
            }
        }
    }
}
