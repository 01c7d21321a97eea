//! The backward pass: probabilities formed again block by block, all gradients of a head in one task.

use super::parts::{
    Block, Part, cut, cut_words, drop_probabilities, key_words, parts, precision, rows_of, score_stride,
};
use crate::ops::Into;
use crate::ops::attention::{BLOCK, Documents, InputGradients, Saved, Shape};
use crate::ops::parallel::{SharedRows, for_each_with_scratch};
use crate::ops::product::{Depth, Matrix, Operand, PANEL_ROWS, Packing, Panels, Side, panel_words};
use crate::ops::simd::{LANES, Level, aligned, dot, exp, kernel};
use crate::ops::values::each_kind;

/// Scratch of one thread in the backward pass: a head's keys and values in panels, its dk and dv; panels of a block's
/// queries, dy, p and ds, its p, ds and dq, and one number for each of its rows.
pub fn backward_part(shape: Shape) -> usize {
    let Shape { sequence, head_dim, .. } = shape;
    let [as_lines, as_depth] = key_words(shape);
    let of_block =
        panel_words(Side::A, BLOCK, head_dim) + 2 * panel_words(Side::B, head_dim, BLOCK) + score_words(shape);
    let gradients = 2 * (sequence * head_dim).next_multiple_of(LANES);
    let numbers = BLOCK * (2 * score_stride(shape) + head_dim + 1);
    2 * as_lines + as_depth + of_block + gradients + numbers.next_multiple_of(LANES) + 4 * LANES
}

/// Words of the panels of a block's scores, with its rows or its keys as lines.
fn score_words(shape: Shape) -> usize {
    panel_words(Side::A, BLOCK, shape.sequence).max(panel_words(Side::A, shape.sequence, BLOCK))
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
    let (level, part) = (Level::current(), backward_part(shape));
    let packing = Packing::new(level, precision(&inputs));
    let task_of = |index: usize| HeadTask {
        level,
        shape,
        scale,
        saved,
        inputs,
        packing,
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
    packing: Packing,
    dy: &'a [f32],
    b: usize,
    kv: usize,
}

impl HeadTask<'_> {
    fn run(&self, to: &Targets, mut scratch: &mut [f32]) {
        let Shape { sequence, heads, kv_heads, head_dim, .. } = self.shape;
        let (packing, group) = (self.packing, heads / kv_heads);
        let [_, k, v] = self.inputs.map(|part| part.rows(self.b * sequence, self.kv * head_dim));
        let [as_lines, as_depth] = key_words(self.shape);
        let [keys, values, keys_in_depth] = [as_lines, as_lines, as_depth].map(|words| cut_words(&mut scratch, words));
        let head = KeyHead {
            keys: packing.pack(Side::B, k, sequence, head_dim, keys),
            values: packing.pack(Side::B, v, sequence, head_dim, values),
            keys_in_depth: packing.pack(Side::B, k.transposed(), head_dim, sequence, keys_in_depth),
        };
        let [dk, dv] = [(); 2].map(|()| cut(&mut scratch, sequence * head_dim));
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
        head: &KeyHead,
        into: Into,
        dk: &mut [f32],
        dv: &mut [f32],
        to: &Targets,
        scratch: &mut [f32],
    ) {
        let Shape { sequence, heads, head_dim, .. } = self.shape;
        let (level, packing, stride) = (self.level, self.packing, score_stride(self.shape));
        let places = self.saved.pattern.documents.of(self.shape, self.b, first, rows_of(self.shape, first));
        let block = Block::new(self.shape, first, places);
        let (rows, from_key, columns) = (block.rows, block.from_key, block.columns());
        let mut rest = scratch;
        let row_words = cut_words(&mut rest, panel_words(Side::A, BLOCK, head_dim));
        let [queries_in_depth, dy_in_depth] =
            [(); 2].map(|()| cut_words(&mut rest, panel_words(Side::B, head_dim, BLOCK)));
        let score_panels = cut_words(&mut rest, score_words(self.shape));
        let [p, ds] = [(); 2].map(|()| cut(&mut rest, rows * stride));
        let (dq, deltas) = (cut(&mut rest, rows * head_dim), cut(&mut rest, rows));

        let (from_row, column, q_width) = (self.b * sequence + first, h * head_dim, heads * head_dim);
        let from = from_row * q_width + column;
        let queries = self.inputs[0].rows(from_row, column);
        let dy: Matrix = Operand::row_major(&self.dy[from..], q_width).into();
        each_kind!(Values, self.saved.y, y => {
            row_dots(level, &y[from..], &self.dy[from..], q_width, head_dim, deltas);
        });
        for (rows_of_a, keys, scale, scores) in
            [(queries, head.keys, self.scale, &mut *p), (dy, head.values, 1.0, &mut *ds)]
        {
            let rows_of_a = packing.pack(Side::A, rows_of_a, rows, head_dim, row_words);
            block.scores(rows_of_a, keys, head_dim, scale, scores, stride);
        }
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

        let [p, ds] = [&*p, &*ds].map(|scores| Matrix::from(Operand::row_major(scores, stride)));
        let weights = packing.pack_if_needed(ds, rows, columns, score_panels);
        block.mix(weights, head.keys_in_depth, head_dim, self.scale, dq);
        for (row, dq) in dq.chunks_exact(head_dim).enumerate() {
            // SAFETY: this task alone has the rows of query head `h` in sequence `b`, and dq, dk, dv lie apart.
            unsafe { to.matrices[0].write(from_row + row, to.columns[0] + column, dq) };
        }
        for (scores, rows_of_b, words, scale, gradient) in
            [(ds, queries, queries_in_depth, self.scale, dk), (p, dy, dy_in_depth, 1.0, dv)]
        {
            let rows_of_b = packing.pack(Side::B, rows_of_b.transposed(), head_dim, rows, words);
            let keys = packing.pack_if_needed(scores.transposed(), columns, rows, score_panels);
            for (key, row) in block.key_panels() {
                let depth = Depth { of_a: row, of_b: row, depth: rows - row };
                let (panel, gradient) = (key / PANEL_ROWS, &mut gradient[(from_key + key) * head_dim..]);
                keys.multiply(panel, rows_of_b, 0..head_dim, depth, scale, gradient, head_dim, into);
            }
        }
    }
}

/// Keys and values of one head, packed for the products of all its blocks.
struct KeyHead<'a> {
    /// Lines are keys, depth is head_dim.
    keys: Panels<'a>,
    values: Panels<'a>,
    /// Lines are the columns of a head, depth are its keys.
    keys_in_depth: Panels<'a>,
}

kernel! {
    /// dots[i] = sum of the products of row i of a and row i of b, both [rows, width] in rows of `stride`.
    fn row_dots<N>(a: &[N], b: &[f32], stride: usize, width: usize, dots: &mut [f32]) {
        for (row, value) in dots.iter_mut().enumerate() {
            *value = dot(&a[row * stride..][..width], &b[row * stride..][..width]);
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
