//! The rotation on the CPU, in place, rows in parallel.

use super::{Direction, Table};
use crate::ops::parallel::rows_a_piece;
use crate::ops::simd::{Level, kernel};
use rayon::prelude::*;

/// Rotates every head of x [R, heads * head_dim], whose rows stand at `positions` [R].
///
/// # Panics
/// When the table lacks a position, besides wrong lengths.
pub fn rotate(table: &Table, direction: Direction, positions: &[u32], x: &mut [f32]) {
    if positions.is_empty() {
        return;
    }
    let (level, head_dim) = (Level::current(), table.head_dim());
    let width = x.len() / positions.len();
    let fits = x.len() == width * positions.len() && width.is_multiple_of(head_dim);
    assert!(fits, "rotary embedding: x is not [R, heads * head_dim]");
    let rows = rows_a_piece(width);
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let (cos, sin) = table.row(position as usize);
            let sign = match direction {
                Direction::Forward => 1.0,
                Direction::Backward => -1.0,
            };
            rotate_row(level, row, cos, sin, sign);
        }
    });
}

kernel! {
    fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        for head in row.chunks_exact_mut(2 * cos.len()) {
            let (first, second) = head.split_at_mut(cos.len());
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                let sin = sign * sin;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Scaling;
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn each_pair_is_turned_as_a_complex_number_and_turned_back() {
        for (heads, head_dim, positions) in [(1, 2, vec![0, 3]), (3, 10, vec![7, 1, 40]), (2, 64, (0..50).collect())] {
            let table = Table::new(10_000.0, head_dim, 50, Scaling::None);
            let x = normal(1, positions.len() * heads * head_dim);
            let mut expected = vec![0.0; x.len()];
            for (start, value) in x.iter().enumerate() {
                let (row, i) = (start / (heads * head_dim), start % head_dim);
                let half = head_dim / 2;
                let angle = f64::from(positions[row]) * 10_000f64.powf(-((i % half) as f64) / half as f64);
                let pair_start = start - i + i % half;
                // The first of a pair is the real part: cos for itself, sin into the other; the second the imaginary.
                let (into_first, into_second) =
                    if i < half { (angle.cos(), angle.sin()) } else { (-angle.sin(), angle.cos()) };
                expected[pair_start] += into_first * f64::from(*value);
                expected[pair_start + half] += into_second * f64::from(*value);
            }
            at_every_level(|level| {
                let mut turned = x.clone();
                rotate(&table, Direction::Forward, &positions, &mut turned);
                assert_close(&format!("{head_dim} {level:?}"), &turned, &expected, 2e-5);
                rotate(&table, Direction::Backward, &positions, &mut turned);
                assert_close(&format!("back {head_dim} {level:?}"), &turned, &to_f64(&x), 1e-6);
            });
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let positions: Vec<u32> = (0..400).map(|r| r % 90).collect();
        let (table, x) = (Table::new(10_000.0, 32, 90, Scaling::None), normal(1, 400 * 96));
        assert_same_bits_for_any_threads(|| {
            let mut turned = x.clone();
            rotate(&table, Direction::Forward, &positions, &mut turned);
            turned
        });
    }
}
