//! The linear layer for a few rows, as generation has them: the weight is read once, straight through, and nothing is
//! packed, since reading it is what takes the time.
//!
//! A row's result does not depend on the other rows, to the last bit, nor on the number of threads.

use super::{Dims, Orientation, Weight};
use crate::ops::Number;
use crate::ops::nf4;
use crate::ops::parallel::{SharedRows, for_each_with_scratch};
use crate::ops::product::{Numbers, Precision};
use crate::ops::simd::{LANES, Level, kernel, lanes_sum};
use half::bf16;

/// Most rows that come here.
pub const FEW_ROWS: usize = 32;
/// Rows of x, and lines of an [O, I] weight, whose products are summed at the same time.
const TILE: usize = 4;
/// Lines of an [O, I] weight in one task.
const OUTPUTS: usize = 32;
/// Lines of an [I, O] weight in one task, whose products with x make one partial sum of y.
const INPUTS: usize = 64;
/// Columns of y that are added up at a time.
const COLUMNS: usize = 1024;

/// y [R, O] = x [R, I] W + bias [O] + residual [R, O], where R is at most [`FEW_ROWS`].
pub fn forward(x: &[f32], weight: Weight, bias: Option<&[f32]>, residual: Option<&[f32]>, y: &mut [f32]) {
    let rounded: Vec<f32>;
    let x = match weight.dims.precision {
        Precision::F32 => x,
        Precision::Bf16 => {
            rounded = x.iter().map(|&value| bf16::round(value).widen()).collect();
            &rounded
        }
    };
    match weight.dims.orientation {
        Orientation::OutIn => by_outputs(x, weight, bias, residual, y),
        Orientation::InOut => by_inputs(x, weight, bias, residual, y),
    }
}

/// `count` lines of `width` numbers of a weight in its precision, from line `first` on; converted into `scratch` where
/// they are not stored so.
fn lines<'a>(
    level: Level,
    weight: Weight<'a>,
    first: usize,
    count: usize,
    width: usize,
    scratch: &'a mut [f32],
) -> &'a [f32] {
    let range = first * width..(first + count) * width;
    let scratch = &mut scratch[..count * width];
    match (weight.data, weight.dims.precision) {
        (Numbers::F32(data), Precision::F32) => return &data[range],
        (Numbers::F32(data), Precision::Bf16) => {
            scratch.iter_mut().zip(&data[range]).for_each(|(to, from)| *to = bf16::round(*from).widen());
        }
        (Numbers::Bf16(data), _) => widen(level, &data[range], scratch),
        (Numbers::F16(data), precision) => {
            scratch.iter_mut().zip(&data[range]).for_each(|(to, from)| *to = from.to_f32());
            round(precision, scratch);
        }
        (Numbers::Nf4(data), precision) => {
            nf4::dequantize(level, data, range.start, scratch);
            round(precision, scratch);
        }
    }
    scratch
}

fn round(precision: Precision, numbers: &mut [f32]) {
    if precision == Precision::Bf16 {
        numbers.iter_mut().for_each(|number| *number = bf16::round(*number).widen());
    }
}

kernel! {
    fn widen(from: &[bf16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }
}

/// A weight [O, I]: a task is some of its lines, each multiplied with every row of x.
fn by_outputs(x: &[f32], weight: Weight, bias: Option<&[f32]>, residual: Option<&[f32]>, y: &mut [f32]) {
    let Dims { inputs, outputs, .. } = weight.dims;
    let (level, rows) = (Level::current(), y.len() / outputs);
    let shared = SharedRows::new(y, outputs);
    let mut scratch = vec![0.0; rayon::current_num_threads() * TILE * inputs.max(1)];
    for_each_with_scratch(outputs.div_ceil(OUTPUTS), TILE * inputs.max(1), &mut scratch, |task, scratch| {
        for first in (task * OUTPUTS..outputs.min((task + 1) * OUTPUTS)).step_by(TILE) {
            let count = TILE.min(outputs - first);
            let lines = lines(level, weight, first, count, inputs, scratch);
            let mut products = [0.0; FEW_ROWS * TILE];
            dots(level, x, lines, inputs, rows, count, &mut products);
            for row in 0..rows {
                // SAFETY: this task alone has these columns of y.
                let y = unsafe { shared.segment(row, first, count) };
                for (column, y) in y.iter_mut().enumerate() {
                    let bias = bias.map_or(0.0, |bias| bias[first + column]);
                    let residual = residual.map_or(0.0, |residual| residual[row * outputs + first + column]);
                    *y = residual + bias + products[row * TILE + column];
                }
            }
        }
    });
}

kernel! {
    /// products[r * TILE + c] = x_r . line_c for `rows` rows of x and `count` lines of `width` numbers.
    fn dots(x: &[f32], lines: &[f32], width: usize, rows: usize, count: usize, products: &mut [f32]) {
        let x_row = |row: usize| &x[row * width..(row + 1) * width];
        let line = |column: usize| &lines[column * width..(column + 1) * width];
        let mut row = 0;
        while row + TILE <= rows && count == TILE {
            let sums = tile([0, 1, 2, 3].map(|i| x_row(row + i)), [0, 1, 2, 3].map(line));
            for (i, sums) in sums.iter().enumerate() {
                products[(row + i) * TILE..][..TILE].copy_from_slice(sums);
            }
            row += TILE;
        }
        for row in row..rows {
            if count == TILE {
                let [sums] = tile([x_row(row)], [0, 1, 2, 3].map(line));
                products[row * TILE..][..TILE].copy_from_slice(&sums);
            } else {
                for column in 0..count {
                    let [[sum]] = tile([x_row(row)], [line(column)]);
                    products[row * TILE + column] = sum;
                }
            }
        }
    }
}

/// The products of R rows with C lines, each summed in lanes, in the same order whatever R and C are.
#[inline(always)]
fn tile<const R: usize, const C: usize>(x: [&[f32]; R], lines: [&[f32]; C]) -> [[f32; C]; R] {
    let width = lines[0].len();
    let (whole, mut sums) = (width / LANES, [[[0.0f32; LANES]; C]; R]);
    let blocks = x.map(|x| &x.as_chunks::<LANES>().0[..whole]);
    let line_blocks = lines.map(|line| &line.as_chunks::<LANES>().0[..whole]);
    for block in 0..whole {
        for c in 0..C {
            for r in 0..R {
                for i in 0..LANES {
                    sums[r][c][i] += blocks[r][block][i] * line_blocks[c][block][i];
                }
            }
        }
    }
    let mut products = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            for (i, place) in (whole * LANES..width).enumerate() {
                sums[r][c][i] += x[r][place] * lines[c][place];
            }
            products[r][c] = lanes_sum(sums[r][c]);
        }
    }
    products
}

/// A weight [I, O]: a task is some of its lines, whose products are a partial sum of every row of y; the partial sums
/// are added in their order.
fn by_inputs(x: &[f32], weight: Weight, bias: Option<&[f32]>, residual: Option<&[f32]>, y: &mut [f32]) {
    let Dims { inputs, outputs, .. } = weight.dims;
    let (level, rows) = (Level::current(), y.len() / outputs);
    let parts = inputs.div_ceil(INPUTS);
    let mut sums = vec![0.0; parts * y.len()];
    let shared = SharedRows::new(&mut sums, y.len());
    let mut scratch = vec![0.0; rayon::current_num_threads() * TILE * outputs];
    for_each_with_scratch(parts, TILE * outputs, &mut scratch, |part, scratch| {
        // SAFETY: this task alone has part `part`.
        let sums = unsafe { shared.segment(part, 0, rows * outputs) };
        for first in (part * INPUTS..inputs.min((part + 1) * INPUTS)).step_by(TILE) {
            let count = TILE.min(inputs - first);
            let lines = lines(level, weight, first, count, outputs, scratch);
            for (row, sums) in sums.chunks_exact_mut(outputs).enumerate() {
                let x = &x[row * inputs + first..][..count];
                add_lines(level, x, lines, sums);
            }
        }
    });
    let shared = SharedRows::new(y, outputs);
    let pieces = outputs.div_ceil(COLUMNS);
    for_each_with_scratch(rows * pieces, 1, &mut vec![0.0; rayon::current_num_threads()], |task, _| {
        let (row, first) = (task / pieces, task % pieces * COLUMNS);
        let width = COLUMNS.min(outputs - first);
        // SAFETY: this task alone has this piece of y.
        let y = unsafe { shared.segment(row, first, width) };
        match residual {
            Some(residual) => y.copy_from_slice(&residual[row * outputs + first..][..width]),
            None => y.fill(0.0),
        }
        if let Some(bias) = bias {
            add(level, &bias[first..first + width], y);
        }
        for part in sums.chunks_exact(rows * outputs) {
            add(level, &part[row * outputs + first..][..width], y);
        }
    });
}

kernel! {
    /// sums += x . lines, for x of at most TILE numbers and as many lines.
    fn add_lines(x: &[f32], lines: &[f32], sums: &mut [f32]) {
        let width = sums.len();
        if let [a, b, c, d] = *x {
            let (first, rest) = lines.split_at(width);
            let (second, rest) = rest.split_at(width);
            let (third, fourth) = rest.split_at(width);
            let fourth = &fourth[..width];
            for i in 0..width {
                sums[i] += (a * first[i] + b * second[i]) + (c * third[i] + d * fourth[i]);
            }
        } else {
            for (x, line) in x.iter().zip(lines.chunks_exact(width)) {
                for (sum, value) in sums.iter_mut().zip(line) {
                    *sum += x * value;
                }
            }
        }
    }
}

kernel! {
    fn add(from: &[f32], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;

    const SHAPES: [(usize, usize, usize); 6] =
        [(1, 1, 1), (1, 37, 5), (5, 7, 3), (7, 130, 70), (16, 64, 129), (FEW_ROWS, 100, 33)];

    #[test]
    fn values_match_the_reference_in_both_orientations_from_f32_and_from_bf16_weights() {
        for (rows, inputs, outputs) in SHAPES {
            let (x, data) = (normal(1, rows * inputs), normal(2, inputs * outputs));
            let (bias, residual) = (normal(3, outputs), normal(4, rows * outputs));
            let stored: Vec<bf16> = data.iter().map(|&value| bf16::from_f32(value)).collect();
            let widened: Vec<f32> = stored.iter().map(|value| value.to_f32()).collect();
            for orientation in [Orientation::InOut, Orientation::OutIn] {
                let dims = Dims { inputs, outputs, orientation, precision: Precision::F32 };
                for (numbers, exact) in [(Numbers::F32(&data), &data), (Numbers::Bf16(&stored), &widened)] {
                    let expected = reference::forward(&to_f64(&x), &to_f64(exact), dims, &to_f64(&bias));
                    let with_residual: Vec<f64> =
                        expected.iter().zip(&residual).map(|(y, residual)| y + f64::from(*residual)).collect();
                    at_every_level(|level| {
                        let mut y = vec![7.0; rows * outputs];
                        let weight = Weight { data: numbers, dims };
                        forward(&x, weight, Some(&bias), None, &mut y);
                        let name = format!("{rows} {dims:?} {level:?}");
                        assert_close(&name, &y, &expected, 2e-5);
                        forward(&x, weight, Some(&bias), Some(&residual), &mut y);
                        assert_close(&name, &y, &with_residual, 2e-5);
                    });
                }
            }
        }
    }

    #[test]
    fn in_bf16_values_are_those_of_rounded_operands_whether_the_weight_is_stored_rounded_or_not() {
        let (rows, inputs, outputs) = (3, 130, 70);
        let (x, data, bias) = (normal(1, rows * inputs), normal(2, inputs * outputs), vec![0.0; outputs]);
        let stored: Vec<bf16> = data.iter().map(|&value| bf16::from_f32(value)).collect();
        let rounded = |values: &[f32]| values.iter().map(|&v| f64::from(bf16::from_f32(v))).collect::<Vec<_>>();
        for orientation in [Orientation::InOut, Orientation::OutIn] {
            let dims = Dims { inputs, outputs, orientation, precision: Precision::Bf16 };
            let expected = reference::forward(&rounded(&x), &rounded(&data), dims, &to_f64(&bias));
            for data in [Numbers::F32(&data), Numbers::Bf16(&stored)] {
                let mut y = vec![7.0; rows * outputs];
                forward(&x, Weight { data, dims }, None, None, &mut y);
                assert_close(&format!("{orientation:?}"), &y, &expected, 2e-5);
            }
        }
    }

    #[test]
    fn weights_in_f16_and_nf4_give_the_bits_of_their_widened_numbers() {
        let (rows, inputs, outputs) = (3, 130, 70);
        let x = normal(1, rows * inputs);
        let half: Vec<half::f16> = normal(2, inputs * outputs).into_iter().map(half::f16::from_f32).collect();
        let half_wide: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
        let four = nf4::quantize(&half_wide);
        let mut four_wide = vec![0.0; inputs * outputs];
        nf4::dequantize_all(&four, &mut four_wide);
        for (narrow, wide) in [(Numbers::F16(&half), &half_wide), (Numbers::Nf4(&four), &four_wide)] {
            for orientation in [Orientation::InOut, Orientation::OutIn] {
                for precision in [Precision::F32, Precision::Bf16] {
                    let dims = Dims { inputs, outputs, orientation, precision };
                    let [found, expected] = [narrow, Numbers::F32(wide)].map(|data| {
                        let mut y = vec![7.0; rows * outputs];
                        forward(&x, Weight { data, dims }, None, None, &mut y);
                        y
                    });
                    assert!(found == expected, "{dims:?}");
                }
            }
        }
    }

    #[test]
    fn a_row_alone_gives_the_bits_that_it_gives_among_others() {
        for (rows, inputs, outputs) in SHAPES {
            let (x, data) = (normal(1, rows * inputs), normal(2, inputs * outputs));
            for orientation in [Orientation::InOut, Orientation::OutIn] {
                let dims = Dims { inputs, outputs, orientation, precision: Precision::F32 };
                let weight = Weight { data: Numbers::F32(&data), dims };
                let (mut together, mut alone) = (vec![0.0; rows * outputs], vec![0.0; rows * outputs]);
                forward(&x, weight, None, None, &mut together);
                for (x, y) in x.chunks_exact(inputs).zip(alone.chunks_exact_mut(outputs)) {
                    forward(x, weight, None, None, y);
                }
                assert!(together == alone, "{rows} {dims:?}");
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let (x, data) = (normal(1, 5 * 300), normal(2, 300 * 200));
        for orientation in [Orientation::InOut, Orientation::OutIn] {
            let dims = Dims { inputs: 300, outputs: 200, orientation, precision: Precision::F32 };
            assert_same_bits_for_any_threads(|| {
                let mut y = vec![0.0; 5 * 200];
                forward(&x, Weight { data: Numbers::F32(&data), dims }, None, None, &mut y);
                y
            });
        }
    }
}
