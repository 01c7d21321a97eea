//! Root mean square normalisation on the CPU: rows in parallel, the weight's gradient as partial sums added in order.

use super::Saved;
use crate::ops::parallel::{add_parts, rows_a_part, rows_a_piece};
use crate::ops::simd::{LANES, Level, kernel, lanes_sum, sum_of};
use crate::ops::values::each_kind;
use crate::ops::{Gradient, Into, Number, ValuesMut};
use rayon::prelude::*;

/// Normalises x [R, C] into y [R, C]; rstd [R] is for [`backward`]. C is `weight.len()`.
pub fn forward<'a>(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    y: impl std::convert::Into<ValuesMut<'a>>,
    rstd: &mut [f32],
) {
    each_kind!(ValuesMut, y.into(), y => forward_to(x, weight, epsilon, y, rstd));
}

fn forward_to<N: Number>(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [N], rstd: &mut [f32]) {
    let (level, width) = (Level::current(), weight.len());
    assert!(width > 0 && x.len() == rstd.len() * width && y.len() == x.len(), "rms norm: lengths");
    let rows = rows_a_piece(width);
    y.par_chunks_mut(rows * width)
        .zip(x.par_chunks(rows * width))
        .zip(rstd.par_chunks_mut(rows))
        .for_each(|((y, x), rstd)| forward_rows(level, x, weight, epsilon, y, rstd));
}

/// Length of the scratch that [`backward`] needs.
pub fn scratch_len(rows: usize, width: usize) -> usize {
    rows.div_ceil(rows_a_part(rows)) * width
}

/// Gradients of [`forward`] for dy [R, C]: dx [R, C] (accumulating adds to the residual stream's) and dweight [C], which
/// a frozen weight does without.
pub fn backward<'a>(
    saved: Saved,
    dy: &[f32],
    dx: Gradient,
    dweight: impl std::convert::Into<Option<Gradient<'a>>>,
    scratch: &mut [f32],
) {
    let (Saved { x, weight, rstd }, dweight) = (saved, dweight.into());
    let (level, width, rows) = (Level::current(), weight.len(), rstd.len());
    let total = rows * width;
    assert!(width > 0 && dweight.as_ref().is_none_or(|d| d.data.len() == width), "rms norm: the weight's gradient");
    assert!(x.len() == total && dy.len() == total && dx.data.len() == total, "rms norm: lengths");
    let scratch = &mut scratch[..scratch_len(rows, width)];
    let part = rows_a_part(rows);
    let dx_into = dx.into;
    dx.data
        .par_chunks_mut(part * width)
        .zip(x.par_chunks(part * width).zip(dy.par_chunks(part * width)))
        .zip(rstd.par_chunks(part))
        .zip(scratch.par_chunks_exact_mut(width))
        .for_each(|(((dx, (x, dy)), rstd), dweight)| {
            dweight.fill(0.0);
            backward_rows(level, x, dy, weight, rstd, dx, dx_into, dweight);
        });
    if let Some(dweight) = dweight {
        add_parts(level, scratch, width, 0, dweight);
    }
}

kernel! {
    fn forward_rows<N>(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [N], rstd: &mut [f32]) {
        let width = weight.len();
        for ((x, y), rstd_out) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd) {
            let mean_square = sum_of(x, |x| x * x) / width as f32;
            let rstd = 1.0 / (mean_square + epsilon).sqrt();
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = N::round(x * rstd * weight);
            }
            *rstd_out = rstd;
        }
    }
}

kernel! {
    fn backward_rows(
        x: &[f32], dy: &[f32], weight: &[f32], rstd: &[f32], dx: &mut [f32], into: Into, dweight: &mut [f32],
    ) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for (((x, dy), dx), &rstd) in rows.zip(rstd) {
            let mut sum_gn = [0.0f32; LANES];
            // One block of at most LANES elements; `dweight` rides on the same read of x and dy.
            #[inline(always)]
            fn block(x: &[f32], dy: &[f32], weight: &[f32], rstd: f32, dweight: &mut [f32], sum_gn: &mut [f32; LANES]) {
                for i in 0..x.len() {
                    let normed = x[i] * rstd;
                    sum_gn[i] += dy[i] * weight[i] * normed;
                    dweight[i] += dy[i] * normed;
                }
            }
            let ((xs, x_tail), (dys, dy_tail)) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
            let (weights, weight_tail) = weight.as_chunks::<LANES>();
            let (dweights, dweight_tail) = dweight.as_chunks_mut::<LANES>();
            for (((x, dy), weight), dweight) in xs.iter().zip(dys).zip(weights).zip(dweights) {
                block(x, dy, weight, rstd, dweight, &mut sum_gn);
            }
            block(x_tail, dy_tail, weight_tail, rstd, dweight_tail, &mut sum_gn);

            let mean_gn = lanes_sum(sum_gn) / width as f32;
            let slope = |x: f32, dy: f32, weight: f32| rstd * (dy * weight - x * rstd * mean_gn);
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

    /// y, rstd, dx, dweight; the gradients added to what `start` says.
    fn run(rows: usize, width: usize, into: Into, start: f32) -> [Vec<f32>; 4] {
        let (x, weight, dy) = (normal(1, rows * width), normal(2, width), normal(3, rows * width));
        let (mut y, mut rstd) = (vec![start; rows * width], vec![start; rows]);
        let (mut dx, mut dweight) = (vec![start; rows * width], vec![start; width]);
        forward(&x, &weight, EPSILON, &mut y, &mut rstd);
        let saved = Saved { x: &x, weight: &weight, rstd: &rstd };
        let mut scratch = vec![f32::NAN; scratch_len(rows, width)];
        let gradient = |data| Gradient { data, into };
        backward(saved, &dy, gradient(&mut dx), gradient(&mut dweight), &mut scratch);
        [y, rstd, dx, dweight]
    }

    #[test]
    fn values_and_gradients_match_the_reference_over_odd_shapes_and_every_instruction_set() {
        for (rows, width) in [(1, 1), (3, 16), (5, 7), (33, 50), (70, 129), (1100, 48), (0, 8)] {
            let [x, weight, dy] =
                [normal(1, rows * width), normal(2, width), normal(3, rows * width)].map(|v| to_f64(&v));
            let (y, rstd) = reference::forward(&x, &weight, f64::from(EPSILON));
            let (dx, dweight) = reference::backward(&x, &weight, f64::from(EPSILON), &dy);
            at_every_level(|level| {
                for (into, start, base) in [(Into::Overwrite, 7.0, 0.0), (Into::Accumulate, 0.5, 0.5)] {
                    let results = run(rows, width, into, start);
                    let shifted = |v: &[f64]| v.iter().map(|v| v + base).collect::<Vec<_>>();
                    let expected = [y.clone(), rstd.clone(), shifted(&dx), shifted(&dweight)];
                    for ((actual, expected), name) in results.iter().zip(&expected).zip(["y", "rstd", "dx", "dweight"])
                    {
                        assert_close(&format!("{name} {rows}x{width} {level:?} {into:?}"), actual, expected, 2e-5);
                    }
                }
            });
        }
    }

    #[test]
    fn written_in_bf16_the_result_is_that_in_f32_rounded_once() {
        for (rows, width) in [(1, 1), (5, 7), (70, 129)] {
            let (x, weight) = (normal(1, rows * width), normal(2, width));
            let [expected, ..] = run(rows, width, Into::Overwrite, 0.0);
            at_every_level(|level| {
                let (mut y, mut rstd) = (vec![bf16::ONE; x.len()], vec![0.0; rows]);
                forward(&x, &weight, EPSILON, &mut y[..], &mut rstd);
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
    fn the_references_gradients_are_those_of_finite_differences() {
        let [x, weight, dy] = [normal(1, 15), normal(2, 5), normal(3, 15)].map(|v| to_f64(&v));
        let loss = |x: &[f64], weight: &[f64]| weighted(&reference::forward(x, weight, 1e-5).0, &dy);
        let (dx, dweight) = reference::backward(&x, &weight, 1e-5, &dy);
        assert_same_gradient("dx", &dx, &differences(&x, |x| loss(x, &weight)));
        assert_same_gradient("dweight", &dweight, &differences(&weight, |weight| loss(&x, weight)));
    }
}
