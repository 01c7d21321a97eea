//! Dropout on the CPU: rows in parallel, a hash for each number.

use super::{Mask, mix};
use crate::ops::parallel::rows_a_piece;
use crate::ops::product::Numbers;
use crate::ops::simd::{Level, kernel};
use rayon::prelude::*;

/// y [R, C] = x [R, C] under the mask.
pub fn forward(mask: Mask, x: Numbers, width: usize, y: &mut [f32]) {
    assert!(x.len() == y.len() && y.len().is_multiple_of(width.max(1)), "dropout: x and y are not [R, C]");
    each_row(width, y, |level, row, y| {
        let from = row * width;
        match x {
            Numbers::F32(x) => y.copy_from_slice(&x[from..from + width]),
            Numbers::Bf16(x) => y.iter_mut().zip(&x[from..]).for_each(|(y, x)| *y = x.to_f32()),
            Numbers::F16(x) => y.iter_mut().zip(&x[from..]).for_each(|(y, x)| *y = x.to_f32()),
            Numbers::Nf4(x) => crate::ops::nf4::dequantize(level, x, from, y),
        }
        columns(level, mask, row, 0, y);
    });
}

/// y [R, C] under the mask, in place.
pub fn in_place(mask: Mask, width: usize, y: &mut [f32]) {
    assert!(y.len().is_multiple_of(width.max(1)), "dropout: y is not [R, C]");
    each_row(width, y, |level, row, y| columns(level, mask, row, 0, y));
}

/// y [R, C] = residual [R, C] + y under the mask.
pub fn add_to(mask: Mask, residual: &[f32], width: usize, y: &mut [f32]) {
    let fits = residual.len() == y.len() && y.len().is_multiple_of(width.max(1));
    assert!(fits, "dropout: the residual and y are not [R, C]");
    each_row(width, y, |level, row, y| {
        columns(level, mask, row, 0, y);
        add(level, &residual[row * width..][..width], y);
    });
}

/// The columns from `first` on of one row under the mask, in place: for an operation that has no more of it.
pub fn columns(level: Level, mask: Mask, row: usize, first: usize, y: &mut [f32]) {
    let [one, two] = row_key(mask, row);
    drop_row(level, mask.threshold, mask.scale, one, two, first as u32, y);
}

/// sum [R, C] += x [R, C] under the mask: the gradient of what was dropped.
pub fn add_masked(mask: Mask, x: &[f32], width: usize, sum: &mut [f32]) {
    assert!(x.len() == sum.len() && sum.len().is_multiple_of(width.max(1)), "dropout: x and sum are not [R, C]");
    each_row(width, sum, |level, row, sum| {
        let [first, second] = row_key(mask, row);
        add_row(level, mask.threshold, mask.scale, first, second, &x[row * width..][..width], sum);
    });
}

fn each_row(width: usize, data: &mut [f32], task: impl Fn(Level, usize, &mut [f32]) + Sync) {
    let level = Level::current();
    let rows = rows_a_piece(width);
    data.par_chunks_mut(rows * width.max(1)).enumerate().for_each(|(piece, data)| {
        data.chunks_exact_mut(width).enumerate().for_each(|(row, data)| task(level, piece * rows + row, data));
    });
}

/// Two words that stand for a row of the mask.
fn row_key(mask: Mask, row: usize) -> [u32; 2] {
    let key = mix(mask.key ^ mix(row as u64));
    [key as u32, (key >> 32) as u32]
}

/// A hash of 32 bits with little bias (two rounds of xor-shift and multiplication, after Wellons' search).
#[inline(always)]
fn hash(column: u32, first: u32, second: u32) -> u32 {
    let x = column.wrapping_mul(0x9e37_79b9) ^ first;
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d).wrapping_add(second);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

kernel! {
    fn drop_row(threshold: u32, scale: f32, first: u32, second: u32, from: u32, y: &mut [f32]) {
        for (column, y) in y.iter_mut().enumerate() {
            let kept = hash(from.wrapping_add(column as u32), first, second) >= threshold;
            *y = if kept { *y * scale } else { 0.0 };
        }
    }
}

kernel! {
    fn add(values: &[f32], target: &mut [f32]) {
        for (target, value) in target.iter_mut().zip(values) {
            *target += value;
        }
    }
}

kernel! {
    fn add_row(threshold: u32, scale: f32, first: u32, second: u32, x: &[f32], sum: &mut [f32]) {
        for (column, (sum, x)) in sum.iter_mut().zip(x).enumerate() {
            let kept = hash(column as u32, first, second) >= threshold;
            *sum += if kept { *x * scale } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Draw;
    use super::*;
    use crate::ops::testing::{assert_same_bits_for_any_threads, at_every_level, normal};

    const DRAW: Draw = Draw { seed: 3, step: 7, micro_batch: 0 };

    fn ones(mask: Mask, rows: usize, width: usize) -> Vec<f32> {
        let mut y = vec![0.0; rows * width];
        forward(mask, Numbers::F32(&vec![1.0; rows * width]), width, &mut y);
        y
    }

    #[test]
    fn the_share_dropped_is_the_probability_in_every_row_column_and_pair_of_neighbours() {
        let (rows, width) = (1000, 800);
        for probability in [0.05, 0.1, 0.5] {
            let y = ones(Mask::new(DRAW.key(4), probability), rows, width);
            let scale = (1.0 / (1.0 - probability)) as f32;
            assert!(y.iter().all(|&y| y == 0.0 || y == scale));
            let share = |y: &mut dyn Iterator<Item = bool>| {
                let (dropped, count) = y.fold((0, 0), |(d, n), dropped| (d + usize::from(dropped), n + 1));
                (dropped as f64 / count as f64, count as f64)
            };
            let near = |what: &str, expected: f64, (found, count): (f64, f64)| {
                let deviation = (expected * (1.0 - expected) / count).sqrt();
                assert!((found - expected).abs() < 5.0 * deviation, "{what}: {found}, expected {expected}");
            };
            near("all", probability, share(&mut y.iter().map(|&y| y == 0.0)));
            for line in 0..width {
                near("a row", probability, share(&mut y[line * width..][..width].iter().map(|&y| y == 0.0)));
                near("a column", probability, share(&mut y.iter().skip(line).step_by(width).map(|&y| y == 0.0)));
            }
            let both = |gap: usize| share(&mut y.iter().zip(&y[gap..]).map(|(a, b)| *a == 0.0 && *b == 0.0));
            near("neighbours", probability * probability, both(1));
            near("rows above each other", probability * probability, both(width));
        }
    }

    #[test]
    fn another_seed_step_micro_batch_or_place_draws_another_mask_and_the_same_the_same() {
        let mask = |draw: Draw, place: u64| ones(Mask::new(draw.key(place), 0.5), 4, 64);
        let first = mask(DRAW, 1);
        assert_eq!(first, mask(DRAW, 1));
        for (draw, place) in [
            (DRAW, 2),
            (Draw { seed: 4, ..DRAW }, 1),
            (Draw { step: 8, ..DRAW }, 1),
            (Draw { micro_batch: 1, ..DRAW }, 1),
            // Not a sum of the parts.
            (Draw { step: 8, micro_batch: 0, seed: 2 }, 1),
        ] {
            let other = mask(draw, place);
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!((64..192).contains(&same), "{draw:?} {place}: {same} of 256 alike");
        }
    }

    #[test]
    fn the_gradient_passes_where_the_value_did_on_every_instruction_set_and_for_any_threads() {
        let (rows, width) = (70, 333);
        let mask = Mask::new(DRAW.key(9), 0.3);
        let (x, kept) = (normal(1, rows * width), ones(mask, rows, width));
        let expected: Vec<f32> = x.iter().zip(&kept).map(|(x, kept)| 0.5 + x * kept).collect();
        at_every_level(|level| {
            let mut sum = vec![0.5; rows * width];
            add_masked(mask, &x, width, &mut sum);
            assert!(sum == expected, "{level:?}");
        });
        assert_same_bits_for_any_threads(|| ones(mask, rows, width));
        let [mut masked, mut sum] = [x.clone(), x.clone()];
        in_place(mask, width, &mut masked);
        add_to(mask, &vec![0.5; x.len()], width, &mut sum);
        assert!(sum == expected && masked.iter().zip(&x).zip(&kept).all(|((y, x), kept)| *y == x * kept));
        // Any part of a row is what it is in the whole.
        let mut part = x[5 * width + 100..6 * width].to_vec();
        columns(Level::current(), mask, 5, 100, &mut part);
        assert_eq!(part, masked[5 * width + 100..6 * width]);
        let mut unchanged = vec![0.0; x.len()];
        forward(Mask::new(1, 0.0), Numbers::F32(&x), width, &mut unchanged);
        assert_eq!(unchanged, x, "a probability of 0 changes nothing");
    }
}
