//! The backward pass: probabilities formed again block by block, all gradients of a head in one task.

use super::parts::{
    Part, columns_from, copy_rows, drop_probabilities, first_key, parts, precision, product, rows_from, score_stride,
    split,
};
use crate::ops::Into;
use crate::ops::attention::{BLOCK, Documents, InputGradients, Saved, Shape};
use crate::ops::parallel::{SharedRows, for_each_with_scratch};
use crate::ops::product::{Operand, Operand16, Precision, Size, Threads, multiply_in};
use crate::ops::simd::{LANES, Level, aligned, dot, exp, kernel};
use crate::ops::values::each_kind;

/// Scratch of one thread in the backward pass: keys, transposed keys and values, dk and dv of a head; q, dy, p, ds and
/// dq of a block, and one number for each of its rows.
pub fn backward_part(shape: Shape) -> usize {
    let (stride, head_dim) = (score_stride(shape), shape.head_dim);
    (5 * stride * head_dim + BLOCK * (2 * stride + 3 * head_dim + 1)).next_multiple_of(LANES)
}

/// The gradients of q, k and v for dy [B*T, heads * head_dim].
///
/// A task is one head of keys and values in one sequence; the gradients of its query heads are added in their order.
pub fn backward(shape: Shape, scale: f32, saved: Saved, dy: &[f32], gradients: InputGradients, scratch: &mut [f32]) {
    shape.check();
    saved.pattern.documents.check(shape);
    assert!(!matches!(saved.pattern.documents, Documents::Apart(_)), "attention backward: documents apart");
    let Shape { batch, sequence, heads, kv_heads, .. } = shape;
    let inputs = parts(shape, saved.inputs);
    let (rows, q_width, kv_width) = (shape.rows(), shape.q_width(), shape.kv_width());
    assert!(saved.y.len() == rows * q_width && dy.len() == saved.y.len(), "attention backward: y and dy");
    assert_eq!(saved.log_sum_exp.len(), batch * heads * sequence, "attention backward: log_sum_exp");
    let (level, part, precision) = (Level::current(), backward_part(shape), precision(&inputs));
    let task_of = |index: usize| HeadTask {
        level,
        shape,
        scale,
        saved,
        inputs,
        precision,
        dy,
        b: index / kv_heads,
        kv: index % kv_heads,
    };
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
    precision: Precision,
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
        let (row, column, size) = (self.b * sequence, self.kv * head_dim, (sequence, head_dim));
        // bf16 is multiplied from where it stands.
        let [stored_keys, stored_values] = [k, v].map(|part| part.bf16(row, column));
        if stored_keys.is_none() {
            k.copy(level, row, column, 1.0, head_dim, &mut keys[..sequence * head_dim]);
            k.transpose(level, (row, column), size, keys_transposed, stride);
        }
        if stored_values.is_none() {
            v.transpose(level, (row, column), size, values_transposed, stride);
        }

        let head = KeyHead { stored_keys, stored_values, keys, keys_transposed, values_transposed };
        let mut into = Into::Overwrite;
        if matches!(self.saved.pattern.documents, Documents::Packed(_)) {
            dk.fill(0.0);
            dv.fill(0.0);
            into = Into::Accumulate;
        }
        for h in self.kv * group..(self.kv + 1) * group {
            // From the last block, which in a whole row reaches every key, to the first: so the very first one may
            // overwrite.
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
        let (level, precision, stride) = (self.level, self.precision, score_stride(self.shape));
        let rows = BLOCK.min(sequence - first);
        let places = self.saved.pattern.documents.of(self.shape, self.b, first, rows);
        let from_key = first_key(first, places);
        let columns = first + rows - from_key;
        let [queries, rest] = split(scratch, BLOCK * head_dim, rows * head_dim);
        let [dy, rest] = split(rest, BLOCK * head_dim, rows * head_dim);
        let [p, rest] = split(rest, BLOCK * stride, rows * stride);
        let [ds, rest] = split(rest, BLOCK * stride, rows * stride);
        let [dq, rest] = split(rest, BLOCK * head_dim, rows * head_dim);
        let deltas = &mut rest[..rows];

        let q = self.inputs[0];
        let (from_row, column, q_width) = (self.b * sequence + first, h * head_dim, heads * head_dim);
        let stored_queries = q.bf16(from_row, column);
        if stored_queries.is_none() {
            q.copy(level, from_row, column, 1.0, head_dim, queries);
        }
        copy_rows(level, &self.dy[from_row * q_width + column..], q_width, 1.0, head_dim, dy);
        each_kind!(Values, self.saved.y, y => {
            row_dots(level, &y[from_row * q_width + column..], q_width, dy, head_dim, deltas);
        });
        let size = Size { m: rows, k: head_dim, n: columns };
        let (queries, dy) = (rows_from(stored_queries, queries, head_dim, 0), Operand::row_major(&*dy, head_dim));
        let keys = columns_from(head.stored_keys, head.keys_transposed, stride, from_key);
        let values = columns_from(head.stored_values, head.values_transposed, stride, from_key);
        product(precision, size, queries, keys, self.scale, p, stride);
        product(precision, size, dy, values, 1.0, ds, stride);
        let logs = &self.saved.log_sum_exp[(self.b * heads + h) * sequence + first..][..rows];
        let query = (self.b * heads + h) * sequence + first;
        let drop = |rows: &mut [f32]| {
            if let Some(mask) = self.saved.pattern.dropout {
                drop_probabilities(level, mask, query, from_key, columns, stride, rows);
            }
        };
        drop(ds);
        score_gradients(level, p, ds, stride, first - from_key, columns, places, logs, deltas);
        drop(p);

        let [p, ds] = [&*p, &*ds].map(|scores| Operand::row_major(scores, stride));
        let size = Size { m: rows, k: columns, n: head_dim };
        let keys = rows_from(head.stored_keys, head.keys, head_dim, from_key);
        product(precision, size, ds, keys, self.scale, dq, head_dim);
        for (row, dq) in dq.chunks_exact(head_dim).enumerate() {
            // SAFETY: this task alone has the rows of query head `h` in sequence `b`, and dq, dk, dv lie apart.
            unsafe { to.matrices[0].write(from_row + row, to.columns[0] + column, dq) };
        }
        let size = Size { m: columns, k: rows, n: head_dim };
        let [dk, dv] = [dk, dv].map(|gradient| &mut gradient[from_key * head_dim..]);
        multiply_in(precision, Threads::One, size, ds.transposed(), queries, self.scale, dk, head_dim, into);
        multiply_in(precision, Threads::One, size, p.transposed(), dy, 1.0, dv, head_dim, into);
    }
}

/// Keys and values of one head: as they stand where that is in bf16, else contiguous.
struct KeyHead<'a> {
    stored_keys: Option<Operand16<'a>>,
    stored_values: Option<Operand16<'a>>,
    /// [T, head_dim].
    keys: &'a [f32],
    /// [head_dim, T], rows of `score_stride`.
    keys_transposed: &'a [f32],
    /// [head_dim, T], rows of `score_stride`.
    values_transposed: &'a [f32],
}

kernel! {
    /// dots[i] = sum of the products of row i of a (rows of `stride`) and row i of b [rows, width].
    fn row_dots<N>(a: &[N], stride: usize, b: &[f32], width: usize, dots: &mut [f32]) {
        for (row, (value, b)) in dots.iter_mut().zip(b.chunks_exact(width)).enumerate() {
            *value = dot(&a[row * stride..][..width], b);
        }
    }
}

kernel! {
    /// Scores in `p` become probabilities, dp in `ds` becomes ds = p * (dp - delta); 0 beyond the diagonal, which
    /// begins in column `diagonal`, and before a row's document, which begins `places` columns before the diagonal.
    fn score_gradients(
        p: &mut [f32], ds: &mut [f32], stride: usize, diagonal: usize, columns: usize, places: &[u32], logs: &[f32],
        deltas: &[f32],
    ) {
        let rows = p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).zip(logs.iter().zip(deltas));
        for (index, ((p, ds), (&log, &delta))) in rows.enumerate() {
            let own = diagonal + index;
            let start = places.get(index).map_or(0, |&place| own - place as usize);
            for scores in [&mut *p, &mut *ds] {
                scores[..start].fill(0.0);
                scores[own + 1..columns].fill(0.0);
            }
            let (p, ds) = (&mut p[start..=own], &mut ds[start..=own]);
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = exp(*p - log);
                *ds = *p * (*ds - delta);
            }
        }
    }
}
