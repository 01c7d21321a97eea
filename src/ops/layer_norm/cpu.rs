//! Layer normalisation on the CPU: rows in parallel, parameter gradients as partial sums added in order.

use super::Saved;
use crate::ops::parallel::{add_parts, rows_a_part, rows_a_piece};
use crate::ops::simd::{LANES, Level, kernel, lanes_sum, sum_of};
use crate::ops::values::each_kind;
use crate::ops::{Gradient, Into, Number, ValuesMut};
use rayon::prelude::*;

/// Normalises x [R, C] into y [R, C]; mean and rstd [R] are for [`backward`]. C is `weight.len()`.
pub fn forward<'a>(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    epsilon: f32,
    y: impl std::convert::Into<ValuesMut<'a>>,
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    each_kind!(ValuesMut, y.into(), y => forward_to(x, weight, bias, epsilon, y, mean, rstd));
}

fn forward_to<N: Number>(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    epsilon: f32,
    y: &mut [N],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let (level, width) = (Level::current(), weight.len());
    assert!(width > 0 && bias.len() == width, "layer norm: weight and bias differ in length or are empty");
    assert!(x.len() == mean.len() * width && y.len() == x.len() && rstd.len() == mean.len(), "layer norm: lengths");
    let rows = rows_a_piece(width);
    y.par_chunks_mut(rows * width)
        .zip(x.par_chunks(rows * width))
        .zip(mean.par_chunks_mut(rows).zip(rstd.par_chunks_mut(rows)))
        .for_each(|((y, x), (mean, rstd))| forward_rows(level, x, weight, bias, epsilon, y, mean, rstd));
}

/// Length of the scratch that [`backward`] needs.
pub fn scratch_len(rows: usize, width: usize) -> usize {
    rows.div_ceil(rows_a_part(rows)) * 2 * width
}

/// Gradients of [`forward`] for dy [R, C]: dx [R, C] (accumulating adds to the residual stream's), dweight and dbias [C],
/// which frozen parameters do without.
pub fn backward<'a>(
    saved: Saved,
    dy: &[f32],
    dx: Gradient,
    dweight: impl std::convert::Into<Option<Gradient<'a>>>,
    dbias: impl std::convert::Into<Option<Gradient<'a>>>,
    scratch: &mut [f32],
) {
    let (Saved { x, weight, mean, rstd }, dweight, dbias) = (saved, dweight.into(), dbias.into());
    let (level, width) = (Level::current(), weight.len());
    let rows = mean.len();
    let fits = |gradient: &Option<Gradient>| gradient.as_ref().is_none_or(|gradient| gradient.data.len() == width);
    assert!(width > 0 && fits(&dweight) && fits(&dbias), "layer norm: parameter gradients");
    let total = rows * width;
    assert!(
        x.len() == total && dy.len() == total && dx.data.len() == total && rstd.len() == rows,
        "layer norm: lengths"
    );
    let scratch = &mut scratch[..scratch_len(rows, width)];
    let part = rows_a_part(rows);
    let dx_into = dx.into;
    dx.data
        .par_chunks_mut(part * width)
        .zip(x.par_chunks(part * width).zip(dy.par_chunks(part * width)))
        .zip(mean.par_chunks(part).zip(rstd.par_chunks(part)))
        .zip(scratch.par_chunks_exact_mut(2 * width))
        .for_each(|(((dx, (x, dy)), (mean, rstd)), sums)| {
            sums.fill(0.0);
            let (dweight, dbias) = sums.split_at_mut(width);
            backward_rows(level, x, dy, weight, mean, rstd, dx, dx_into, dweight, dbias);
        });
    for (from, gradient) in [(0, dweight), (width, dbias)] {
        if let Some(gradient) = gradient {
            add_parts(level, scratch, 2 * width, from, gradient);
        }
    }
}

kernel! {
    fn forward_rows<N>(
        x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, y: &mut [N], mean: &mut [f32], rstd: &mut [f32],
    ) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(mean.iter_mut().zip(rstd));
        for ((x, y), (mean_out, rstd_out)) in rows {
            let mean = sum_of(x, |x| x) / width as f32;
            let variance = sum_of(x, |x| (x - mean) * (x - mean)) / width as f32;
            let rstd = 1.0 / (variance + epsilon).sqrt();
            for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = N::round((x - mean) * rstd * weight + bias);
            }
            (*mean_out, *rstd_out) = (mean, rstd);
        }
    }
}

kernel! {
    fn backward_rows(
        x: &[f32], dy: &[f32], weight: &[f32], mean: &[f32], rstd: &[f32],
        dx: &mut [f32], into: Into, dweight: &mut [f32], dbias: &mut [f32],
    ) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for (((x, dy), dx), (&mean, &rstd)) in rows.zip(mean.iter().zip(rstd)) {
            let (mut sum_g, mut sum_gn) = ([0.0f32; LANES], [0.0f32; LANES]);
            // One block of at most LANES elements; `dweight` and `dbias` ride on the same read of x and dy.
            #[inline(always)]
            fn block(
                x: &[f32], dy: &[f32], weight: &[f32], mean: f32, rstd: f32,
                dweight: &mut [f32], dbias: &mut [f32], sum_g: &mut [f32; LANES], sum_gn: &mut [f32; LANES],
            ) {
                for i in 0..x.len() {
                    let normed = (x[i] - mean) * rstd;
                    let g = dy[i] * weight[i];
                    sum_g[i] += g;
                    sum_gn[i] += g * normed;
                    dweight[i] += dy[i] * normed;
                    dbias[i] += dy[i];
                }
            }
            let ((xs, x_tail), (dys, dy_tail)) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
            let (weights, weight_tail) = weight.as_chunks::<LANES>();
            let (dweights, dweight_tail) = dweight.as_chunks_mut::<LANES>();
            let (dbiases, dbias_tail) = dbias.as_chunks_mut::<LANES>();
            for (((x, dy), weight), (dweight, dbias)) in
                xs.iter().zip(dys).zip(weights).zip(dweights.iter_mut().zip(dbiases))
            {
                block(x, dy, weight, mean, rstd, dweight, dbias, &mut sum_g, &mut sum_gn);
            }
            block(x_tail, dy_tail, weight_tail, mean, rstd, dweight_tail, dbias_tail, &mut sum_g, &mut sum_gn);

            let mean_g = lanes_sum(sum_g) / width as f32;
            let mean_gn = lanes_sum(sum_gn) / width as f32;
            let slope = |x: f32, dy: f32, weight: f32| rstd * (dy * weight - mean_g - (x - mean) * rstd * mean_gn);
            let elements = dx.iter_mut().zip(x).zip(dy.iter().zip(weight));
            match into {
                Into::Overwrite => elements.for_each(|((dx, x), (dy, weight))| *dx = slope(*x, *dy, *weight)),
                Into::Accumulate => elements.for_each(|((dx, x), (dy, weight))| *dx += slope(*x, *dy, *weight)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;
    use half::bf16;

    const EPSILON: f32 = 1e-5;

    /// (x, weight, bias, dy) of R rows: rows of different scale and mean.
    fn problem(rows: usize, width: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>) {
        let mut x = normal(1, rows * width);
        for (row, values) in x.chunks_exact_mut(width).enumerate() {
            values.iter_mut().for_each(|value| *value = *value * (row % 5 + 1) as f32 + (row % 3) as f32 * 4.0);
        }
        (x, normal(2, width), normal(3, width), normal(4, rows * width))
    }

    /// y, mean, rstd, dx, dweight, dbias; the gradients added to what `start` says.
    fn run(rows: usize, width: usize, into: Into, start: f32) -> [Vec<f32>; 6] {
        let (x, weight, bias, dy) = problem(rows, width);
        let [mut y, mut dx] = [(); 2].map(|()| vec![start; rows * width]);
        let [mut mean, mut rstd] = [(); 2].map(|()| vec![start; rows]);
        let [mut dweight, mut dbias] = [(); 2].map(|()| vec![start; width]);
        forward(&x, &weight, &bias, EPSILON, &mut y, &mut mean, &mut rstd);
        let saved = Saved { x: &x, weight: &weight, mean: &mean, rstd: &rstd };
        let mut scratch = vec![f32::NAN; scratch_len(rows, width)];
        let gradient = |data| Gradient { data, into };
        backward(saved, &dy, gradient(&mut dx), gradient(&mut dweight), gradient(&mut dbias), &mut scratch);
        [y, mean, rstd, dx, dweight, dbias]
    }

    #[test]
    fn values_and_gradients_match_the_reference_over_odd_shapes_and_every_instruction_set() {
        for (rows, width) in [(1, 1), (3, 16), (5, 7), (33, 50), (70, 129), (1100, 48), (0, 8)] {
            let (x, weight, bias, dy) = problem(rows, width);
            let [x, weight, bias, dy] = [x, weight, bias, dy].map(|v| to_f64(&v));
            let epsilon = f64::from(EPSILON);
            let (y, mean, rstd) = reference::forward(&x, &weight, &bias, epsilon);
            let (dx, dweight, dbias) = reference::backward(&x, &weight, epsilon, &dy);
            at_every_level(|level| {
                for (into, start) in [(Into::Overwrite, 7.0), (Into::Accumulate, 0.5)] {
                    let results = run(rows, width, into, start);
                    let base = if into == Into::Accumulate { 0.5 } else { 0.0 };
                    let shifted = |v: &[f64]| v.iter().map(|v| v + base).collect::<Vec<_>>();
                    let expected =
                        [y.clone(), mean.clone(), rstd.clone(), shifted(&dx), shifted(&dweight), shifted(&dbias)];
                    let names = ["y", "mean", "rstd", "dx", "dweight", "dbias"];
                    for ((actual, expected), name) in results.iter().zip(&expected).zip(names) {
                        // A row of one element has variance 0, where epsilon alone scales the gradient's rounding.
                        let tolerance = if width == 1 { 1e-3 } else { 2e-5 };
                        assert_close(&format!("{name} {rows}x{width} {level:?} {into:?}"), actual, expected, tolerance);
                    }
                }
            });
        }
    }

    #[test]
    fn written_in_bf16_the_result_is_that_in_f32_rounded_once() {
        for (rows, width) in [(1, 1), (5, 7), (70, 129)] {
            let (x, weight, bias, _) = problem(rows, width);
            let [expected, ..] = run(rows, width, Into::Overwrite, 0.0);
            at_every_level(|level| {
                let (mut y, [mut mean, mut rstd]) = (vec![bf16::ONE; x.len()], [(); 2].map(|()| vec![0.0; rows]));
                forward(&x, &weight, &bias, EPSILON, &mut y[..], &mut mean, &mut rstd);
                let same = |(y, &e): (&bf16, &f32)| y.to_bits() == bf16::from_f32(e).to_bits();
                assert!(y.iter().zip(&expected).all(same), "{rows}x{width} {level:?}");
            });
        }
    }

    #[test]
    fn every_instruction_set_and_any_number_of_threads_give_the_same_bits() {
        let all = || run(1100, 50, Into::Accumulate, 0.5).concat();
        assert_same_bits_for_any_threads(all);
        let expected = all();
        at_every_level(|level| assert!(all() == expected, "{level:?}"));
    }

    #[test]
    fn a_constant_row_of_great_numbers_gives_the_bias_and_nan_stays_in_its_row() {
        let (weight, bias) = ([2.0f32; 24], [0.25f32; 24]);
        let mut x = vec![1e6f32; 72];
        x[30] = f32::NAN;
        let (mut y, mut mean, mut rstd) = (vec![0.0; 72], vec![0.0; 3], vec![0.0; 3]);
        forward(&x, &weight, &bias, EPSILON, &mut y, &mut mean, &mut rstd);
        assert!(y[..24].iter().chain(&y[48..]).all(|&y| y == 0.25));
        assert!(y[24..48].iter().all(|y| y.is_nan()));
    }

    #[test]
    fn the_references_gradients_are_those_of_finite_differences() {
        let (rows, width) = (3, 5);
        let (x, weight, bias, dy) = problem(rows, width);
        let [x, weight, bias, dy] = [x, weight, bias, dy].map(|v| to_f64(&v));
        let loss =
            |x: &[f64], weight: &[f64], bias: &[f64]| weighted(&reference::forward(x, weight, bias, 1e-5).0, &dy);
        let (dx, dweight, dbias) = reference::backward(&x, &weight, 1e-5, &dy);
        assert_same_gradient("dx", &dx, &differences(&x, |x| loss(x, &weight, &bias)));
        assert_same_gradient("dweight", &dweight, &differences(&weight, |weight| loss(&x, weight, &bias)));
        assert_same_gradient("dbias", &dbias, &differences(&bias, |bias| loss(&x, &weight, bias)));
    }
}
