//! The forward pass: blocks of query rows against all keys up to the diagonal.

use super::parts::{Block, cut, cut_words, drop_probabilities, key_words, parts, precision, rows_of, score_stride};
use super::scratch_len;
use crate::ops::attention::{BLOCK, Documents, Inputs, Pattern, Shape};
use crate::ops::parallel::{SharedRows, for_each_with_scratch};
use crate::ops::product::{Operand, Packing, Side, panel_words};
use crate::ops::simd::{LANES, Level, aligned, exp_in_place, kernel, max};

/// Scratch of one thread in the forward pass: keys and values of a head in panels; queries and probabilities of a block in
/// panels, its scores and results, and two numbers for each of its rows.
pub fn forward_part(shape: Shape) -> usize {
    let Shape { sequence, head_dim, .. } = shape;
    let panels = key_words(shape).iter().sum::<usize>()
        + panel_words(Side::A, BLOCK, head_dim)
        + panel_words(Side::A, BLOCK, sequence);
    let numbers = BLOCK * (score_stride(shape) + head_dim + 2);
    panels + numbers.next_multiple_of(LANES) + 4 * LANES
}

/// y [B*T, heads * head_dim] and log_sum_exp [B, heads, T].
pub fn forward<'a>(
    shape: Shape,
    scale: f32,
    inputs: Inputs,
    pattern: impl Into<Pattern<'a>>,
    y: &mut [f32],
    log_sum_exp: &mut [f32],
    scratch: &mut [f32],
) {
    shape.check();
    let pattern = pattern.into();
    pattern.documents.check(shape);
    if let Documents::Apart(lengths) = pattern.documents {
        assert!(pattern.dropout.is_none(), "attention: dropout counts the rows of one document");
        return forward_apart(shape, scale, inputs, lengths, y, log_sum_exp, scratch);
    }
    let Pattern { documents, dropout } = pattern;
    let Shape { batch, sequence, heads, kv_heads, head_dim } = shape;
    let inputs = parts(shape, inputs);
    let precision = precision(&inputs);
    let [q, k, v] = inputs;
    assert_eq!(y.len(), shape.rows() * shape.q_width(), "attention: y is not [B*T, heads * head_dim]");
    assert_eq!(log_sum_exp.len(), batch * heads * sequence, "attention: log_sum_exp is not [B, heads, T]");
    let (level, stride) = (Level::current(), score_stride(shape));
    let packing = Packing::new(level, precision);
    let y = SharedRows::new(y, shape.q_width());
    let log_sum_exp = SharedRows::new(log_sum_exp, sequence);
    // Where heads are few, several tasks share one: each has every `turns`-th block, and all find the same bits.
    let blocks = sequence.div_ceil(BLOCK);
    let turns = (2 * rayon::current_num_threads()).div_ceil((batch * heads).max(1)).min(blocks);
    for_each_with_scratch(batch * heads * turns, forward_part(shape), aligned(scratch), |task, mut scratch| {
        let (head_index, turn) = (task / turns, task % turns);
        let (b, h) = (head_index / heads, head_index % heads);
        let kv_column = h / (heads / kv_heads) * head_dim;
        let [words_of_keys, words_of_values] = key_words(shape);
        let keys = cut_words(&mut scratch, words_of_keys);
        let keys = packing.pack(Side::B, k.rows(b * sequence, kv_column), sequence, head_dim, keys);
        let values = cut_words(&mut scratch, words_of_values);
        let values = packing.pack(Side::B, v.rows(b * sequence, kv_column).transposed(), head_dim, sequence, values);
        let query_words = cut_words(&mut scratch, panel_words(Side::A, BLOCK, head_dim));
        let probability_words = cut_words(&mut scratch, panel_words(Side::A, BLOCK, sequence));
        for first in (turn..blocks).step_by(turns).map(|block| block * BLOCK) {
            let places = documents.of(shape, b, first, rows_of(shape, first));
            let block = Block::new(shape, first, places);
            let (rows, from_key, columns) = (block.rows, block.from_key, block.columns());
            let mut rest = &mut *scratch;
            let scores = cut(&mut rest, rows * stride);
            let results = cut(&mut rest, rows * head_dim);
            let [inverses, logs] = [cut(&mut rest, rows), cut(&mut rest, rows)];

            let queries = q.rows(b * sequence + first, h * head_dim);
            let queries = packing.pack(Side::A, queries, rows, head_dim, query_words);
            block.scores(queries, keys, head_dim, scale, scores, stride);
            softmax_rows(level, scores, stride, first - from_key, columns, places, inverses, logs);
            if let Some(mask) = dropout {
                drop_probabilities(level, mask, head_index * sequence + first, from_key, columns, stride, scores);
            }
            let probabilities = Operand::row_major(&*scores, stride).into();
            let probabilities = packing.pack_if_needed(probabilities, rows, columns, probability_words);
            block.mix(probabilities, values, head_dim, 1.0, results);
            scale_rows(level, results, inverses);
            for (row, result) in results.chunks_exact(head_dim).enumerate() {
                // SAFETY: this task alone has the rows first..first + rows of head h in sequence b.
                unsafe { y.write(b * sequence + first + row, h * head_dim, result) };
            }
            // SAFETY: as above.
            unsafe { log_sum_exp.write(head_index, first, &logs[..rows]) };
        }
    });
}

/// [`forward`] for one document of the row after the other.
fn forward_apart(
    shape: Shape,
    scale: f32,
    inputs: Inputs,
    lengths: &[usize],
    y: &mut [f32],
    log_sum_exp: &mut [f32],
    scratch: &mut [f32],
) {
    let (mut y, mut log_sum_exp, mut first) = (y, log_sum_exp, 0);
    for &length in lengths {
        let one = Shape { sequence: length, ..shape };
        let (own_y, rest) = y.split_at_mut(length * shape.q_width());
        let (own_log_sum_exp, logs) = log_sum_exp.split_at_mut(length * shape.heads);
        // Scratch of the row would be more parts than there are threads.
        let scratch_len = scratch_len(one).min(scratch.len());
        let own_inputs = inputs.rows(shape, first, length);
        forward(one, scale, own_inputs, Documents::Whole, own_y, own_log_sum_exp, &mut scratch[..scratch_len]);
        (y, log_sum_exp, first) = (rest, logs, first + length);
    }
}

kernel! {
    /// Scores become e^(s - max), 0 beyond the diagonal, which begins in column `diagonal`, and 0 before a row's
    /// document, which begins `places` columns before the diagonal (no places: in column 0).
    fn softmax_rows(
        scores: &mut [f32], stride: usize, diagonal: usize, columns: usize, places: &[u32], inverses: &mut [f32],
        logs: &mut [f32],
    ) {
        let rows = scores.chunks_exact_mut(stride).zip(inverses.iter_mut().zip(logs));
        for (index, (row, (inverse, log))) in rows.enumerate() {
            let own = diagonal + index;
            let (row, beyond) = row[..columns].split_at_mut(own + 1);
            let (before, row) = row.split_at_mut(places.get(index).map_or(0, |&place| own - place as usize));
            before.fill(0.0);
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
