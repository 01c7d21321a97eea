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
    /// The rows from `row` on, of the columns from `column` of this part on.
    fn rows(&self, row: usize, column: usize) -> Operand<'a> {
        let data = &self.data[row * self.row_stride + self.column + column..];
        Operand { data, row_stride: self.row_stride, column_stride: 1 }
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

/// Scratch of one thread in the forward pass: scores, results, and two numbers a row.
fn forward_part(shape: Shape) -> usize {
    (BLOCK * (score_stride(shape) + shape.head_dim + 2)).next_multiple_of(LANES)
}

/// Scratch of one thread in the backward pass: p, ds, dq of a block, dk and dv of a head, one number a row.
fn backward_part(shape: Shape) -> usize {
    let head = shape.sequence * shape.head_dim;
    (BLOCK * (2 * score_stride(shape) + shape.head_dim + 1) + 2 * head).next_multiple_of(LANES)
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
    let blocks = sequence.div_ceil(BLOCK);
    let y = SharedRows::new(y, shape.q_width());
    let log_sum_exp = SharedRows::new(log_sum_exp, sequence);
    for_each_with_scratch(batch * heads * blocks, forward_part(shape), aligned(scratch), |task, scratch| {
        let (head_index, first) = (task / blocks, (blocks - 1 - task % blocks) * BLOCK);
        let (b, h) = (head_index / heads, head_index % heads);
        let kv_column = h / (heads / kv_heads) * head_dim;
        let (rows, columns) = (BLOCK.min(sequence - first), (first + BLOCK).min(sequence));
        let (scores, rest) = scratch.split_at_mut(BLOCK * stride);
        let (results, rest) = rest.split_at_mut(BLOCK * head_dim);
        let (inverses, logs) = rest.split_at_mut(BLOCK);

        let queries = q.rows(b * sequence + first, h * head_dim);
        let keys = k.rows(b * sequence, kv_column).transposed();
        let size = Size { m: rows, k: head_dim, n: columns };
        multiply(Threads::One, size, queries, keys, scale, scores, stride, Into::Overwrite);
        softmax_rows(level, &mut scores[..rows * stride], stride, first, columns, &mut inverses[..rows], logs);

        let values = v.rows(b * sequence, kv_column);
        let size = Size { m: rows, k: columns, n: head_dim };
        multiply(
            Threads::One,
            size,
            Operand::row_major(scores, stride),
            values,
            1.0,
            results,
            head_dim,
            Into::Overwrite,
        );
        scale_rows(level, &mut results[..rows * head_dim], &inverses[..rows]);
        for (row, result) in results[..rows * head_dim].chunks_exact(head_dim).enumerate() {
            // SAFETY: this task alone has the rows first..first + rows of head h in sequence b.
            unsafe { y.write(b * sequence + first + row, h * head_dim, result) };
        }
        // SAFETY: as above.
        unsafe { log_sum_exp.write(head_index, first, &logs[..rows]) };
    });
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
        let group = heads / kv_heads;
        let (dk, rest) = scratch.split_at_mut(sequence * head_dim);
        let (dv, scratch) = rest.split_at_mut(sequence * head_dim);
        let mut into = Into::Overwrite;
        for h in self.kv * group..(self.kv + 1) * group {
            // From the last block, which reaches every key, to the first: so the very first one may overwrite.
            for block in (0..sequence.div_ceil(BLOCK)).rev() {
                self.block(h, block * BLOCK, into, dk, dv, to, scratch);
                into = Into::Accumulate;
            }
        }
        for (which, gradient) in [(1, dk), (2, dv)] {
            for (t, row) in gradient.chunks_exact(head_dim).enumerate() {
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
        into: Into,
        dk: &mut [f32],
        dv: &mut [f32],
        to: &Targets,
        scratch: &mut [f32],
    ) {
        let Shape { sequence, heads, head_dim, .. } = self.shape;
        let (level, stride, one) = (self.level, score_stride(self.shape), Threads::One);
        let (rows, columns) = (BLOCK.min(sequence - first), (first + BLOCK).min(sequence));
        let (p, rest) = scratch.split_at_mut(BLOCK * stride);
        let (ds, rest) = rest.split_at_mut(BLOCK * stride);
        let (dq, rest) = rest.split_at_mut(BLOCK * head_dim);
        let deltas = &mut rest[..rows];

        let [q, k, v] = self.inputs;
        let (start, from_row) = (self.b * sequence, self.b * sequence + first);
        let queries = q.rows(from_row, h * head_dim);
        let (keys, values) = (k.rows(start, self.kv * head_dim), v.rows(start, self.kv * head_dim));
        let q_width = heads * head_dim;
        let from = from_row * q_width + h * head_dim;
        let dy = Operand { data: &self.dy[from..], row_stride: q_width, column_stride: 1 };

        let size = Size { m: rows, k: head_dim, n: columns };
        multiply(one, size, queries, keys.transposed(), self.scale, p, stride, Into::Overwrite);
        multiply(one, size, dy, values.transposed(), 1.0, ds, stride, Into::Overwrite);
        row_dots(level, &self.saved.y[from..], dy.data, q_width, head_dim, deltas);
        let logs = &self.saved.log_sum_exp[(self.b * heads + h) * sequence + first..][..rows];
        score_gradients(level, &mut p[..rows * stride], &mut ds[..rows * stride], stride, first, columns, logs, deltas);

        let (p, ds) = (Operand::row_major(p, stride), Operand::row_major(ds, stride));
        let size = Size { m: rows, k: columns, n: head_dim };
        multiply(one, size, ds, keys, self.scale, dq, head_dim, Into::Overwrite);
        for (row, dq) in dq[..rows * head_dim].chunks_exact(head_dim).enumerate() {
            // SAFETY: this task alone has the rows of query head `h` in sequence `b`, and dq, dk, dv lie apart.
            unsafe { to.matrices[0].write(from_row + row, to.columns[0] + h * head_dim, dq) };
        }
        let size = Size { m: columns, k: rows, n: head_dim };
        multiply(one, size, ds.transposed(), queries, self.scale, dk, head_dim, into);
        multiply(one, size, p.transposed(), dy, 1.0, dv, head_dim, into);
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
    /// dots[i] = sum over the first `width` columns of a[i] * b[i], rows of `stride`.
    fn row_dots(a: &[f32], b: &[f32], stride: usize, width: usize, dots: &mut [f32]) {
        for (row, value) in dots.iter_mut().enumerate() {
            *value = dot(&a[row * stride..][..width], &b[row * stride..][..width]);
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
