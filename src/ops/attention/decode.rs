//! Attention of one new position of each sequence to a cache of keys and values, for generation.

use super::Shape;
use crate::ops::parallel::{SharedRows, for_each_with_scratch};
use crate::ops::simd::{Level, dot, exp_in_place, kernel, max};

/// Keys and values of the positions so far.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// [S, capacity, kv_heads * head_dim] of S sequences.
    pub keys: &'a [f32],
    /// As `keys`.
    pub values: &'a [f32],
    /// Positions that a sequence has room for.
    pub capacity: usize,
    /// The sequence that each row of q belongs to, [B].
    pub sequences: &'a [usize],
    /// Positions that each sequence attends to, the newest included, [S]; at least 1 where it has a row.
    pub lengths: &'a [usize],
}

/// Length of the scratch that [`decode`] needs with the current pool: the scores of one head for each thread.
pub fn decode_scratch_len(capacity: usize) -> usize {
    rayon::current_num_threads() * capacity
}

/// y [B, heads * head_dim] for the queries q [B, heads * head_dim] of each sequence's newest position.
/// `shape.sequence` plays no part.
pub fn decode(shape: Shape, scale: f32, q: &[f32], cache: Cache, y: &mut [f32], scratch: &mut [f32]) {
    shape.check();
    let Shape { batch, heads, kv_heads, head_dim, .. } = shape;
    let Cache { keys, values, capacity, sequences, lengths } = cache;
    let stride = shape.kv_width();
    assert!(q.len() == batch * shape.q_width() && y.len() == q.len(), "decode: q and y are not [B, heads * head_dim]");
    assert!(
        keys.len() == lengths.len() * capacity * stride && values.len() == keys.len(),
        "decode: the cache's length"
    );
    let fits = |&sequence: &usize| lengths.get(sequence).is_some_and(|length| (1..=capacity).contains(length));
    assert!(sequences.len() == batch && sequences.iter().all(fits), "decode: sequences and lengths");
    let level = Level::current();
    let y = SharedRows::new(y, head_dim);
    for_each_with_scratch(batch * heads, capacity, scratch, |task, scores| {
        let (b, h) = (task / heads, task % heads);
        let from = sequences[b] * capacity * stride + h / (heads / kv_heads) * head_dim;
        let scores = &mut scores[..lengths[sequences[b]]];
        let sum = scores_of(level, &q[task * head_dim..][..head_dim], &keys[from..], stride, scale, scores);
        // SAFETY: this task alone has row `task` of y.
        let result = unsafe { y.segment(task, 0, head_dim) };
        mix(level, scores, 1.0 / sum, &values[from..], stride, result);
    });
}

kernel! {
    /// scores[j] = e^(scale * query . key_j - max), and their sum.
    fn scores_of(query: &[f32], keys: &[f32], stride: usize, scale: f32, scores: &mut [f32]) -> f32 {
        for (score, key) in scores.iter_mut().zip(keys.chunks(stride)) {
            *score = scale * dot(query, &key[..query.len()]);
        }
        let greatest = max(scores);
        exp_in_place(scores, greatest)
    }
}

kernel! {
    /// result = sum_j scores[j] * inverse * value_j.
    fn mix(scores: &[f32], inverse: f32, values: &[f32], stride: usize, result: &mut [f32]) {
        let width = result.len();
        result.fill(0.0);
        for (score, value) in scores.iter().zip(values.chunks(stride)) {
            let p = score * inverse;
            for (result, value) in result.iter_mut().zip(&value[..width]) {
                *result += p * value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn a_decoded_position_is_the_last_row_of_the_whole_attention() {
        for (heads, kv_heads, head_dim, lengths) in [(1, 1, 1, [1, 3]), (4, 2, 16, [7, 65]), (3, 3, 5, [100, 1])] {
            let shape = Shape { batch: 2, sequence: 0, heads, kv_heads, head_dim };
            let capacity = 101;
            let keys = normal(1, 2 * capacity * shape.kv_width());
            let (values, q) = (normal(2, keys.len()), normal(3, 2 * shape.q_width()));
            let mut expected = Vec::new();
            for (b, &length) in lengths.iter().enumerate() {
                let one = Shape { batch: 1, sequence: length, ..shape };
                let from = b * capacity * shape.kv_width();
                let [k, v] = [&keys, &values].map(|m| to_f64(&m[from..from + length * shape.kv_width()]));
                // Only the last row counts, so the queries of the others may be anything.
                let mut all_q = vec![0.0; (length - 1) * shape.q_width()];
                all_q.extend(to_f64(&q[b * shape.q_width()..(b + 1) * shape.q_width()]));
                let (y, _) = reference::forward(one, shape.scale().into(), &all_q, &k, &v);
                expected.extend_from_slice(&y[(length - 1) * shape.q_width()..]);
            }
            at_every_level(|level| {
                let cache = Cache { keys: &keys, values: &values, capacity, sequences: &[0, 1], lengths: &lengths };
                let mut y = vec![7.0; q.len()];
                let mut scratch = vec![f32::NAN; decode_scratch_len(capacity)];
                decode(shape, shape.scale(), &q, cache, &mut y, &mut scratch);
                assert_close(&format!("y {heads} {level:?}"), &y, &expected, 3e-6);
                // The second sequence alone.
                let (one, width) = (Shape { batch: 1, ..shape }, shape.q_width());
                let mut alone = vec![7.0; width];
                let cache = Cache { sequences: &[1], ..cache };
                decode(one, shape.scale(), &q[width..], cache, &mut alone, &mut scratch);
                assert_eq!(alone, y[width..], "{level:?}");
            });
        }
    }
}
