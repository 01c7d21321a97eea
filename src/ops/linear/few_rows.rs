//! The linear layer for a few rows, as generation has them: the weight is read once, straight through, and nothing is
//! packed, since reading it is what takes the time.
//!
//! A row's result does not depend on the other rows, to the last bit, nor on the number of threads.

#[cfg(target_arch = "x86_64")]
use super::few_rows_x86;
use super::{Dims, Orientation, Weight};
use crate::ops::nf4;
use crate::ops::parallel::{SharedRows, for_each_with_scratch};
use crate::ops::product::{Numbers, Precision};
#[cfg(target_arch = "x86_64")]
use crate::ops::simd::Set;
use crate::ops::simd::{LANES, Level, kernel, lanes_sum};
use crate::ops::values::each_kind;
use crate::ops::{Number, Values};
use half::bf16;
use half::slice::HalfFloatSliceExt;

/// Most rows that come here.
pub const FEW_ROWS: usize = 32;
/// Lines of a weight that are read at the same time.
pub(super) const TILE: usize = 4;
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
/// they are not stored so. bf16 is left as it is where `level` reads it as fast.
fn lines<'a>(
    level: Level,
    weight: Weight<'a>,
    first: usize,
    count: usize,
    width: usize,
    scratch: &'a mut [f32],
) -> Values<'a> {
    let range = first * width..(first + count) * width;
    let scratch = &mut scratch[..count * width];
    match (weight.data, weight.dims.precision) {
        (Numbers::F32(data), Precision::F32) => return Values::F32(&data[range]),
        (Numbers::Bf16(data), _) if reads_bf16(level) => return Values::Bf16(&data[range]),
        (Numbers::F32(data), Precision::Bf16) => {
            scratch.copy_from_slice(&data[range]);
            round(level, scratch);
        }
        (Numbers::Bf16(data), _) => widen(level, &data[range], scratch),
        (Numbers::F16(data), precision) => {
            data[range].convert_to_f32_slice(scratch);
            round_to(level, precision, scratch);
        }
        (Numbers::Nf4(data), precision) => {
            nf4::dequantize(level, data, range.start, scratch);
            round_to(level, precision, scratch);
        }
    }
    Values::F32(scratch)
}

/// Whether products with bf16 lines need no copy in f32.
fn reads_bf16(level: Level) -> bool {
    #[cfg(target_arch = "x86_64")]
    return level.set() == Set::Avx512;
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

fn round_to(level: Level, precision: Precision, numbers: &mut [f32]) {
    if precision == Precision::Bf16 {
        round(level, numbers);
    }
}

kernel! {
    fn round(numbers: &mut [f32]) {
        for number in numbers {
            *number = bf16::round(*number).widen();
        }
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
            products_of(level, x, lines, inputs, count, &mut products[..rows * TILE]);
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

/// products[r * TILE + c] = x_r . line_c for the rows of x and `count` lines of `width` numbers.
fn products_of(level: Level, x: &[f32], lines: Values, width: usize, count: usize, products: &mut [f32]) {
    each_kind!(Values, lines, lines => {
        // A line that is missing is one that is there already; nobody reads its products.
        let lines = [0, 1, 2, 3].map(|column: usize| &lines[column.min(count - 1) * width..][..width]);
        #[cfg(target_arch = "x86_64")]
        if level.set() == Set::Avx512 {
            // SAFETY: a level of this set exists only where the processor has it.
            return unsafe { few_rows_x86::dots(x, lines, width, products) };
        }
        dots(level, x, lines, width, products);
    });
}

kernel! {
    /// As [`products_of`], for whole tiles of lines.
    fn dots<N>(x: &[f32], lines: [&[N]; TILE], width: usize, products: &mut [f32]) {
        for (x, products) in x.chunks_exact(width).zip(products.chunks_exact_mut(TILE)) {
            products.copy_from_slice(&four_dots(x, lines));
        }
    }
}

/// The products of x with four lines, each summed in lanes. Lines and sums have names, not indices: over an index the
/// compiler keeps the sums in memory and adds them one by one.
#[inline(always)]
fn four_dots<N: Number>(x: &[f32], [first, second, third, fourth]: [&[N]; TILE]) -> [f32; TILE] {
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let ((first, first_rest), (second, second_rest)) = (first.as_chunks::<LANES>(), second.as_chunks::<LANES>());
    let ((third, third_rest), (fourth, fourth_rest)) = (third.as_chunks::<LANES>(), fourth.as_chunks::<LANES>());
    let (mut a, mut b, mut c, mut d) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for ((((x, first), second), third), fourth) in x_blocks.iter().zip(first).zip(second).zip(third).zip(fourth) {
        for i in 0..LANES {
            a[i] += x[i] * first[i].widen();
        }
        for i in 0..LANES {
            b[i] += x[i] * second[i].widen();
        }
        for i in 0..LANES {
            c[i] += x[i] * third[i].widen();
        }
        for i in 0..LANES {
            d[i] += x[i] * fourth[i].widen();
        }
    }
    for (i, x) in x_rest.iter().enumerate() {
        a[i] += x * first_rest[i].widen();
        b[i] += x * second_rest[i].widen();
        c[i] += x * third_rest[i].widen();
        d[i] += x * fourth_rest[i].widen();
    }
    [lanes_sum(a), lanes_sum(b), lanes_sum(c), lanes_sum(d)]
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
                each_kind!(Values, lines, lines => add_lines(level, x, lines, sums));
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
    fn add_lines<N>(x: &[f32], lines: &[N], sums: &mut [f32]) {
        let width = sums.len();
        if let [a, b, c, d] = *x {
            let (first, rest) = lines.split_at(width);
            let (second, rest) = rest.split_at(width);
            let (third, fourth) = rest.split_at(width);
            let fourth = &fourth[..width];
            for i in 0..width {
                sums[i] += (a * first[i].widen() + b * second[i].widen()) + (c * third[i].widen() + d * fourth[i].widen());
            }
        } else {
            for (x, line) in x.iter().zip(lines.chunks_exact(width)) {
                for (sum, value) in sums.iter_mut().zip(line) {
                    *sum += x * value.widen();
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
    use half::f16;

    const SHAPES: [(usize, usize, usize); 6] =
        [(1, 1, 1), (1, 37, 5), (5, 7, 3), (7, 130, 70), (16, 64, 129), (FEW_ROWS, 100, 33)];

    #[test]
    fn values_match_the_reference_in_both_orientations_from_f32_bf16_and_f16_weights() {
        for (rows, inputs, outputs) in SHAPES {
            let (x, data) = (normal(1, rows * inputs), normal(2, inputs * outputs));
            let (bias, residual) = (normal(3, outputs), normal(4, rows * outputs));
            let stored: Vec<bf16> = data.iter().map(|&value| bf16::from_f32(value)).collect();
            let widened: Vec<f32> = stored.iter().map(|value| value.to_f32()).collect();
            let half: Vec<f16> = data.iter().map(|&value| f16::from_f32(value)).collect();
            let halves: Vec<f32> = half.iter().map(|value| value.to_f32()).collect();
            for orientation in [Orientation::InOut, Orientation::OutIn] {
                let dims = Dims { inputs, outputs, orientation, precision: Precision::F32 };
                let kinds =
                    [(Numbers::F32(&data), &data), (Numbers::Bf16(&stored), &widened), (Numbers::F16(&half), &halves)];
                for (numbers, exact) in kinds {
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
    fn narrow_weights_give_the_bits_of_their_widened_numbers_on_every_instruction_set() {
        let (rows, inputs, outputs) = (6, 130, 70);
        let (x, data) = (normal(1, rows * inputs), normal(2, inputs * outputs));
        let half: Vec<half::f16> = data.iter().map(|&x| half::f16::from_f32(x)).collect();
        let half_wide: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
        let brain: Vec<bf16> = data.iter().map(|&x| bf16::from_f32(x)).collect();
        let brain_wide: Vec<f32> = brain.iter().map(|x| x.to_f32()).collect();
        let four = nf4::quantize(&half_wide);
        let mut four_wide = vec![0.0; inputs * outputs];
        nf4::dequantize_all(&four, &mut four_wide);
        let cases = [
            (Numbers::F16(&half), &half_wide),
            (Numbers::Bf16(&brain), &brain_wide),
            (Numbers::Nf4(&four), &four_wide),
        ];
        for (narrow, wide) in cases {
            for orientation in [Orientation::InOut, Orientation::OutIn] {
                for precision in [Precision::F32, Precision::Bf16] {
                    let dims = Dims { inputs, outputs, orientation, precision };
                    let mut all: Vec<Vec<f32>> = Vec::new();
                    at_every_level(|_| {
                        all.extend([narrow, Numbers::F32(wide)].map(|data| {
                            let mut y = vec![7.0; rows * outputs];
                            forward(&x, Weight { data, dims }, None, None, &mut y);
                            y
                        }));
                    });
                    assert!(all.iter().all(|y| y == &all[0]), "{dims:?}");
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
