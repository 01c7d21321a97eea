//! Attention on the CPU: blocks of query rows against all keys up to the diagonal, one task a thread at a time.

use super::{BLOCK, InputGradients, Inputs, Saved, Shape};
use crate::ops::Into;
use crate::ops::parallel::{SharedRows, for_each_with_scratch};
use crate::ops::product::{Operand, Size, Threads, multiply};
use crate::ops::simd::{LANES, Level, aligned, dot, exp, exp_in_place, kernel, max};

/// One of q, k, v: rows of `row_stride`, of which this operand has the columns from `column` on.
#[derive(Clone, Copy)]
struct Part<'a> {
    data: &'a [f32],
    row_stride: usize,
    column: usize,
}

impl<'a> Part<'a> {
    /// From `row` on, the columns from `column` of this part on.
    fn from(&self, row: usize, column: usize) -> &'a [f32] {
        &self.data[row * self.row_stride + self.column + column..]
    }
}

/// q, k and v of `inputs`.
fn parts(shape: Shape, inputs: Inputs) -> [Part; 3] {
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

/// Elements between rows of a block of scores: whole registers.
fn score_stride(shape: Shape) -> usize {
    shape.sequence.next_multiple_of(LANES)
}

/// Scratch of one thread in the forward pass: keys (transposed) and values of a head; queries, scores and results of a
/// block, and two numbers for each of its rows.
fn forward_part(shape: Shape) -> usize {
    let (stride, head_dim) = (score_stride(shape), shape.head_dim);
    (2 * stride * head_dim + BLOCK * (stride + 2 * head_dim + 2)).next_multiple_of(LANES)
}

/// Scratch of one thread in the backward pass: keys, transposed keys and values, dk and dv of a head; q, dy, p, ds and
/// dq of a block, and one number for each of its rows.
fn backward_part(shape: Shape) -> usize {
    let (stride, head_dim) = (score_stride(shape), shape.head_dim);
    (5 * stride * head_dim + BLOCK * (2 * stride + 3 * head_dim + 1)).next_multiple_of(LANES)
}

/// Length of the scratch that [`forward`] and [`backward`] need with the current pool. A shorter one (of a smaller
/// pool) is right too, and leaves threads idle.
pub fn scratch_len(shape: Shape) -> usize {
    rayon::current_num_threads() * forward_part(shape).max(backward_part(shape)) + LANES
}

/// y [B*T, heads * head_dim] and log_sum_exp [B, heads, T].
pub fn forward(shape: Shape, scale: f32, inputs: Inputs, y: &mut [f32], log_sum_exp: &mut [f32], scratch: &mut [f32]) {
    shape.check();
    let Shape { batch, sequence, heads, kv_heads, head_dim } = shape;
    let [q, k, v] = parts(shape, inputs);
    assert_eq!(y.len(), shape.rows() * shape.q_width(), "attention: y is not [B*T, heads * head_dim]");
    assert_eq!(log_sum_exp.len(), batch * heads * sequence, "attention: log_sum_exp is not [B, heads, T]");
    let (level, stride) = (Level::current(), score_stride(shape));
    let y = SharedRows::new(y, shape.q_width());
    let log_sum_exp = SharedRows::new(log_sum_exp, sequence);
    // Where heads are few, several tasks share one: each has every `turns`-th block, and all find the same bits.
    let blocks = sequence.div_ceil(BLOCK);
    let turns = (2 * rayon::current_num_threads()).div_ceil((batch * heads).max(1)).min(blocks);
    for_each_with_scratch(batch * heads * turns, forward_part(shape), aligned(scratch), |task, scratch| {
        let (head_index, turn) = (task / turns, task % turns);
        let (b, h) = (head_index / heads, head_index % heads);
        let kv_column = h / (heads / kv_heads) * head_dim;
        let (keys, rest) = scratch.split_at_mut(head_dim * stride);
        let (values, rest) = rest.split_at_mut(stride * head_dim);
        transpose(level, k.from(b * sequence, kv_column), k.row_stride, sequence, head_dim, keys, stride);
        copy_rows(
            level,
            v.from(b * sequence, kv_column),
            v.row_stride,
            1.0,
            head_dim,
            &mut values[..sequence * head_dim],
        );
        for first in (turn..blocks).step_by(turns).map(|block| block * BLOCK) {
            let (rows, columns) = (BLOCK.min(sequence - first), (first + BLOCK).min(sequence));
            let (queries, rest) = rest.split_at_mut(BLOCK * head_dim);
            let (scores, rest) = rest.split_at_mut(BLOCK * stride);
            let (results, rest) = rest.split_at_mut(BLOCK * head_dim);
            let (inverses, logs) = rest.split_at_mut(BLOCK);
            let (queries, scores) = (&mut queries[..rows * head_dim], &mut scores[..rows * stride]);
            let results = &mut results[..rows * head_dim];

            let from = q.from(b * sequence + first, h * head_dim);
            copy_rows(level, from, q.row_stride, scale, head_dim, queries);
            let size = Size { m: rows, k: head_dim, n: columns };
            product(size, Operand::row_major(queries, head_dim), Operand::row_major(keys, stride), scores, stride);
            softmax_rows(level, scores, stride, first, columns, &mut inverses[..rows], logs);
            let size = Size { m: rows, k: columns, n: head_dim };
            product(size, Operand::row_major(scores, stride), Operand::row_major(values, head_dim), results, head_dim);
            scale_rows(level, results, &inverses[..rows]);
            for (row, result) in results.chunks_exact(head_dim).enumerate() {
                // SAFETY: this task alone has the rows first..first + rows of head h in sequence b.
                unsafe { y.write(b * sequence + first + row, h * head_dim, result) };
            }
            // SAFETY: as above.
            unsafe { log_sum_exp.write(head_index, first, &logs[..rows]) };
        }
    });
}

/// c = a b on this thread.
fn product(size: Size, a: Operand, b: Operand, c: &mut [f32], stride: usize) {
    multiply(Threads::One, size, a, b, 1.0, c, stride, Into::Overwrite);
}

/// The gradients of q, k and v for dy [B*T, heads * head_dim].
///
/// A task is one head of keys and values in one sequence; the gradients of its query heads are added in their order.
pub fn backward(shape: Shape, scale: f32, saved: Saved, dy: &[f32], gradients: InputGradients, scratch: &mut [f32]) {
    shape.check();
    let Shape { batch, sequence, heads, kv_heads, .. } = shape;
    let inputs = parts(shape, saved.inputs);
    let (rows, q_width, kv_width) = (shape.rows(), shape.q_width(), shape.kv_width());
    assert!(saved.y.len() == rows * q_width && dy.len() == saved.y.len(), "attention backward: y and dy");
    assert_eq!(saved.log_sum_exp.len(), batch * heads * sequence, "attention backward: log_sum_exp");
    let (level, part) = (Level::current(), backward_part(shape));
    let task_of =
        |index: usize| HeadTask { level, shape, scale, saved, inputs, dy, b: index / kv_heads, kv: index % kv_heads };
    match gradients {
        InputGradients::Fused(data) => {
            assert_eq!(data.len(), rows * (q_width + 2 * kv_width), "attention backward: the fused gradient");
            let shared = SharedRows::new(data, q_width + 2 * kv_width);
            let to = Targets { matrices: [&shared; 3], columns: [0, q_width, q_width + kv_width] };
            for_each_with_scratch(batch * kv_heads, part, aligned(scratch), |index, scratch| {
                task_of(index).run(&to, scratch);
            });
        }
        InputGradients::Separate { dq, dk, dv } => {
            let fit = dq.len() == rows * q_width && dk.len() == rows * kv_width && dv.len() == dk.len();
            assert!(fit, "attention backward: dq, dk or dv are not [B*T, heads * head_dim]");
            let dq = SharedRows::new(dq, q_width);
            let [dk, dv] = [dk, dv].map(|data| SharedRows::new(data, kv_width));
            let to = Targets { matrices: [&dq, &dk, &dv], columns: [0; 3] };
            for_each_with_scratch(batch * kv_heads, part, aligned(scratch), |index, scratch| {
                task_of(index).run(&to, scratch);
            });
        }
    }
}

/// Where dq, dk and dv go, and their first columns there.
struct Targets<'a> {
    matrices: [&'a SharedRows<'a>; 3],
    columns: [usize; 3],
}

/// The backward pass of key and value head `kv` of sequence `b`, with all query heads that read it.
struct HeadTask<'a> {
    level: Level,
    shape: Shape,
    scale: f32,
    saved: Saved<'a>,
    inputs: [Part<'a>; 3],
    dy: &'a [f32],
    b: usize,
    kv: usize,
}

impl HeadTask<'_> {
    fn run(&self, to: &Targets, scratch: &mut [f32]) {
        let Shape { sequence, heads, kv_heads, head_dim, .. } = self.shape;
        let (level, stride, group) = (self.level, score_stride(self.shape), heads / kv_heads);
        let (keys, rest) = scratch.split_at_mut(stride * head_dim);
        let (keys_transposed, rest) = rest.split_at_mut(stride * head_dim);
        let (values_transposed, rest) = rest.split_at_mut(stride * head_dim);
        let (dk, rest) = rest.split_at_mut(stride * head_dim);
        let (dv, scratch) = rest.split_at_mut(stride * head_dim);
        let [_, k, v] = self.inputs;
        let [from_k, from_v] = [k, v].map(|part| part.from(self.b * sequence, self.kv * head_dim));
        copy_rows(level, from_k, k.row_stride, 1.0, head_dim, &mut keys[..sequence * head_dim]);
        transpose(level, from_k, k.row_stride, sequence, head_dim, keys_transposed, stride);
        transpose(level, from_v, v.row_stride, sequence, head_dim, values_transposed, stride);

        let head = KeyHead { keys, keys_transposed, values_transposed };
        let mut into = Into::Overwrite;
        for h in self.kv * group..(self.kv + 1) * group {
            // From the last block, which reaches every key, to the first: so the very first one may overwrite.
            for block in (0..sequence.div_ceil(BLOCK)).rev() {
                self.block(h, block * BLOCK, &head, into, dk, dv, to, scratch);
                into = Into::Accumulate;
            }
        }
        for (which, gradient) in [(1, dk), (2, dv)] {
            for (t, row) in gradient[..sequence * head_dim].chunks_exact(head_dim).enumerate() {
                let column = to.columns[which] + self.kv * head_dim;
                // SAFETY: this task alone has head `kv` of sequence `b`, and dq, dk, dv lie apart.
                unsafe { to.matrices[which].write(self.b * sequence + t, column, row) };
            }
        }
    }

    /// Adds what the query rows first..first + BLOCK of head `h` give to dk and dv [T, head_dim], and writes their dq.
    #[allow(clippy::too_many_arguments, reason = "the buffers of one block")]
    fn block(
        &self,
        h: usize,
        first: usize,
        head: &KeyHead,
        into: Into,
        dk: &mut [f32],
        dv: &mut [f32],
        to: &Targets,
        scratch: &mut [f32],
    ) {
        let Shape { sequence, heads, head_dim, .. } = self.shape;
        let (level, stride) = (self.level, score_stride(self.shape));
        let (rows, columns) = (BLOCK.min(sequence - first), (first + BLOCK).min(sequence));
        let [queries, rest] = split(scratch, BLOCK * head_dim, rows * head_dim);
        let [dy, rest] = split(rest, BLOCK * head_dim, rows * head_dim);
        let [p, rest] = split(rest, BLOCK * stride, rows * stride);
        let [ds, rest] = split(rest, BLOCK * stride, rows * stride);
        let [dq, rest] = split(rest, BLOCK * head_dim, rows * head_dim);
        let deltas = &mut rest[..rows];

        let q = self.inputs[0];
        let (from_row, column, q_width) = (self.b * sequence + first, h * head_dim, heads * head_dim);
        copy_rows(level, q.from(from_row, column), q.row_stride, self.scale, head_dim, queries);
        copy_rows(level, &self.dy[from_row * q_width + column..], q_width, 1.0, head_dim, dy);
        row_dots(level, &self.saved.y[from_row * q_width + column..], q_width, dy, head_dim, deltas);
        let size = Size { m: rows, k: head_dim, n: columns };
        let [queries, dy] = [&*queries, &*dy].map(|rows| Operand::row_major(rows, head_dim));
        product(size, queries, Operand::row_major(head.keys_transposed, stride), p, stride);
        product(size, dy, Operand::row_major(head.values_transposed, stride), ds, stride);
        let logs = &self.saved.log_sum_exp[(self.b * heads + h) * sequence + first..][..rows];
        score_gradients(level, p, ds, stride, first, columns, logs, deltas);

        let [p, ds] = [&*p, &*ds].map(|scores| Operand::row_major(scores, stride));
        let size = Size { m: rows, k: columns, n: head_dim };
        product(size, ds, Operand::row_major(head.keys, head_dim), dq, head_dim);
        scale_all(level, dq, self.scale);
        for (row, dq) in dq.chunks_exact(head_dim).enumerate() {
            // SAFETY: this task alone has the rows of query head `h` in sequence `b`, and dq, dk, dv lie apart.
            unsafe { to.matrices[0].write(from_row + row, to.columns[0] + column, dq) };
        }
        let size = Size { m: columns, k: rows, n: head_dim };
        multiply(Threads::One, size, ds.transposed(), queries, 1.0, dk, head_dim, into);
        multiply(Threads::One, size, p.transposed(), dy, 1.0, dv, head_dim, into);
    }
}

/// Keys and values of one head, contiguous.
struct KeyHead<'a> {
    /// [T, head_dim].
    keys: &'a [f32],
    /// [head_dim, T], rows of `score_stride`.
    keys_transposed: &'a [f32],
    /// [head_dim, T], rows of `score_stride`.
    values_transposed: &'a [f32],
}

/// The first `used` elements of the first `reserved` ones, and what comes after those.
fn split(buffer: &mut [f32], reserved: usize, used: usize) -> [&mut [f32]; 2] {
    let (first, rest) = buffer.split_at_mut(reserved);
    [&mut first[..used], rest]
}

kernel! {
    /// to [rows, width] = scale * rows of `stride`.
    fn copy_rows(from: &[f32], stride: usize, scale: f32, width: usize, to: &mut [f32]) {
        for (row, to) in to.chunks_exact_mut(width).enumerate() {
            for (to, from) in to.iter_mut().zip(&from[row * stride..][..width]) {
                *to = scale * from;
            }
        }
    }
}

kernel! {
    /// to [columns, rows] (rows of `to_stride`) = the transpose of from [rows, columns] (rows of `stride`).
    fn transpose(from: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [f32], to_stride: usize) {
        for first in (0..rows).step_by(LANES) {
            let height = LANES.min(rows - first);
            for column in 0..columns {
                let source = &from[first * stride + column..];
                let target = &mut to[column * to_stride + first..][..height];
                for (row, target) in target.iter_mut().enumerate() {
                    *target = source[row * stride];
                }
            }
        }
    }
}

kernel! {
    /// Scores of the rows from `first` on become e^(s - max), 0 beyond the diagonal up to `columns`.
    pub fn softmax_rows(
        scores: &mut [f32], stride: usize, first: usize, columns: usize, inverses: &mut [f32], logs: &mut [f32],
    ) {
        let rows = scores.chunks_exact_mut(stride).zip(inverses.iter_mut().zip(logs));
        for (index, (row, (inverse, log))) in rows.enumerate() {
            let (row, beyond) = row[..columns].split_at_mut(first + index + 1);
            beyond.fill(0.0);
            let greatest = max(row);
            let sum = exp_in_place(row, greatest);
            *inverse = 1.0 / sum;
            *log = greatest + sum.ln();
        }
    }
}

kernel! {
    fn scale_rows(rows: &mut [f32], scales: &[f32]) {
        for (row, &scale) in rows.chunks_exact_mut(rows.len() / scales.len()).zip(scales) {
            row.iter_mut().for_each(|value| *value *= scale);
        }
    }
}

kernel! {
    fn scale_all(values: &mut [f32], scale: f32) {
        values.iter_mut().for_each(|value| *value *= scale);
    }
}

kernel! {
    /// dots[i] = sum of the products of row i of a (rows of `stride`) and row i of b [rows, width].
    fn row_dots(a: &[f32], stride: usize, b: &[f32], width: usize, dots: &mut [f32]) {
        for (row, (value, b)) in dots.iter_mut().zip(b.chunks_exact(width)).enumerate() {
            *value = dot(&a[row * stride..][..width], b);
        }
    }
}

kernel! {
    /// Scores in `p` become probabilities, dp in `ds` becomes ds = p * (dp - delta); 0 beyond the diagonal.
    fn score_gradients(
        p: &mut [f32], ds: &mut [f32], stride: usize, first: usize, columns: usize, logs: &[f32], deltas: &[f32],
    ) {
        let rows = p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).zip(logs.iter().zip(deltas));
        for (index, ((p, ds), (&log, &delta))) in rows.enumerate() {
            let ((p, p_beyond), (ds, ds_beyond)) =
                (p[..columns].split_at_mut(first + index + 1), ds[..columns].split_at_mut(first + index + 1));
            p_beyond.fill(0.0);
            ds_beyond.fill(0.0);
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = exp(*p - log);
                *ds = *p * (*ds - delta);
            }
        }
    }
}

#[cfg(test)]
mod tests;
