//! Batch normalisation on the CPU: statistics in parts that are joined in order, then one pass over the elements.

use super::{Activation, EPSILON, MOMENTUM, Saved, Statistics};
use crate::ops::Gradient;
use crate::ops::parallel::{add_parts, rows_a_part, rows_a_piece};
use crate::ops::simd::{Level, kernel};
use rayon::prelude::*;

/// Length of the scratch that the functions here need.
pub fn scratch_len(rows: usize, channels: usize) -> usize {
    rows.div_ceil(rows_a_part(rows)).max(rows.div_ceil(rows_a_piece(channels))) * 2 * channels + 2 * channels
}

/// y from the batch's own statistics; `mean` and `rstd` [C] are for [`backward`]. `running`, where given, moves.
#[allow(clippy::too_many_arguments, reason = "the operation has this many operands")]
pub fn forward_training(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    activation: Activation,
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
    running: Option<&mut Statistics>,
    scratch: &mut [f32],
) {
    let (level, channels) = (Level::current(), weight.len());
    let rows = checked_rows(x, y, bias, residual, channels);
    assert!(mean.len() == channels && rstd.len() == channels, "batch norm: statistics are not [C]");
    let piece = rows_a_piece(channels);
    let scratch = &mut scratch[..rows.div_ceil(piece) * 2 * channels];
    x.par_chunks(piece * channels).zip(scratch.par_chunks_exact_mut(2 * channels)).for_each(|(x, sums)| {
        let (mean, squares) = sums.split_at_mut(channels);
        piece_moments(level, x, mean, squares);
    });
    let mut variance = vec![0.0f64; channels];
    for c in 0..channels {
        // Chan's rule joins the pieces' means and sums of squared deviations.
        let (mut count, mut total_mean, mut squares) = (0.0f64, 0.0f64, 0.0f64);
        for (index, part) in scratch.chunks_exact(2 * channels).enumerate() {
            let added = (rows - index * piece).min(piece) as f64;
            let delta = f64::from(part[c]) - total_mean;
            squares += f64::from(part[channels + c]) + delta * delta * count * added / (count + added);
            total_mean += delta * added / (count + added);
            count += added;
        }
        variance[c] = squares / count;
        mean[c] = total_mean as f32;
        rstd[c] = (1.0 / (variance[c] + f64::from(EPSILON)).sqrt()) as f32;
    }
    if let Some(running) = running {
        let unbiased = rows as f64 / (rows as f64 - 1.0).max(1.0);
        let blend = |old: f32, new: f64| ((1.0 - MOMENTUM) * f64::from(old) + MOMENTUM * new) as f32;
        for c in 0..channels {
            running.mean[c] = blend(running.mean[c], f64::from(mean[c]));
            running.variance[c] = blend(running.variance[c], variance[c] * unbiased);
        }
    }
    normalise(x, weight, bias, residual, activation, mean, rstd, y);
}

/// y from running statistics, as in evaluation.
pub fn forward_running(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    activation: Activation,
    running: &Statistics,
    y: &mut [f32],
) {
    checked_rows(x, y, bias, residual, weight.len());
    let rstd: Vec<f32> = running.variance.iter().map(|variance| 1.0 / (variance + EPSILON).sqrt()).collect();
    normalise(x, weight, bias, residual, activation, &running.mean, &rstd, y);
}

fn checked_rows(x: &[f32], y: &[f32], bias: &[f32], residual: Option<&[f32]>, channels: usize) -> usize {
    assert!(channels > 0 && bias.len() == channels, "batch norm: weight and bias differ in length or are empty");
    assert!(!x.is_empty() && x.len().is_multiple_of(channels) && y.len() == x.len(), "batch norm: lengths");
    assert!(residual.is_none_or(|residual| residual.len() == x.len()), "batch norm: the residual is not [R, C]");
    x.len() / channels
}

#[allow(clippy::too_many_arguments, reason = "the operation has this many operands")]
fn normalise(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    activation: Activation,
    mean: &[f32],
    rstd: &[f32],
    y: &mut [f32],
) {
    let (level, channels) = (Level::current(), weight.len());
    // y = x scale + shift
    let scale: Vec<f32> = weight.iter().zip(rstd).map(|(weight, rstd)| weight * rstd).collect();
    let shift: Vec<f32> = bias.iter().zip(mean.iter().zip(&scale)).map(|(bias, (mean, s))| bias - mean * s).collect();
    let floor = if activation == Activation::Relu { 0.0 } else { f32::NEG_INFINITY };
    let piece = rows_a_piece(channels) * channels;
    let pieces = y.par_chunks_mut(piece).zip(x.par_chunks(piece));
    match residual {
        None => pieces.for_each(|(y, x)| affine(level, x, &scale, &shift, floor, y)),
        Some(residual) => pieces
            .zip(residual.par_chunks(piece))
            .for_each(|((y, x), residual)| affine_plus(level, x, residual, &scale, &shift, floor, y)),
    }
}

/// Gradients of [`forward_training`]. `dy` becomes g, which is the gradient of the residual.
pub fn backward(saved: Saved, dy: &mut [f32], dx: &mut [f32], dweight: Gradient, dbias: Gradient, scratch: &mut [f32]) {
    let Saved { x, y, weight, mean, rstd, activation } = saved;
    let (level, channels) = (Level::current(), weight.len());
    assert!(x.len() == dy.len() && dx.len() == dy.len(), "batch norm backward: lengths");
    assert!(activation == Activation::Identity || y.len() == x.len(), "batch norm backward: y is not [R, C]");
    let rows = x.len() / channels;
    let part = rows_a_part(rows);
    let (sums, scratch) = scratch.split_at_mut(rows.div_ceil(part) * 2 * channels);
    let (sum, dot) = scratch[..2 * channels].split_at_mut(channels);
    let parts = dy.par_chunks_mut(part * channels).zip(x.par_chunks(part * channels));
    let parts = parts.zip(sums.par_chunks_exact_mut(2 * channels));
    match activation {
        Activation::Identity => parts.for_each(|((g, x), sums)| gradient_sums(level, x, mean, rstd, g, sums)),
        Activation::Relu => parts.zip(y.par_chunks(part * channels)).for_each(|(((g, x), sums), y)| {
            mask(level, y, g);
            gradient_sums(level, x, mean, rstd, g, sums);
        }),
    }
    add_parts(level, sums, 2 * channels, 0, Gradient::overwrite(sum));
    add_parts(level, sums, 2 * channels, channels, Gradient::overwrite(dot));
    // dx = g a + x b + c, a channel's numbers.
    let (mut a, mut b, mut c) = (vec![0.0; channels], vec![0.0; channels], vec![0.0; channels]);
    for i in 0..channels {
        a[i] = weight[i] * rstd[i];
        b[i] = -a[i] * rstd[i] * dot[i] / rows as f32;
        c[i] = -a[i] * sum[i] / rows as f32 - b[i] * mean[i];
    }
    let piece = rows_a_piece(channels) * channels;
    dx.par_chunks_mut(piece)
        .zip(x.par_chunks(piece).zip(dy.par_chunks(piece)))
        .for_each(|(dx, (x, g))| input_gradient(level, x, g, &a, &b, &c, dx));
    add_parts(level, sum, channels, 0, dbias);
    add_parts(level, dot, channels, 0, dweight);
}

kernel! {
    /// mean [C] of the rows of x and squares [C], the sums of squared deviations from it.
    fn piece_moments(x: &[f32], mean: &mut [f32], squares: &mut [f32]) {
        let channels = mean.len();
        mean.fill(0.0);
        squares.fill(0.0);
        for row in x.chunks_exact(channels) {
            for (sum, value) in mean.iter_mut().zip(row) {
                *sum += value;
            }
        }
        let count = (x.len() / channels) as f32;
        for sum in mean.iter_mut() {
            *sum /= count;
        }
        for row in x.chunks_exact(channels) {
            for ((square, value), mean) in squares.iter_mut().zip(row).zip(&*mean) {
                *square += (value - mean) * (value - mean);
            }
        }
    }
}

kernel! {
    fn affine(x: &[f32], scale: &[f32], shift: &[f32], floor: f32, y: &mut [f32]) {
        let channels = scale.len();
        for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
            for ((y, x), (scale, shift)) in y.iter_mut().zip(x).zip(scale.iter().zip(shift)) {
                let value = x * scale + shift;
                // A NaN stays a NaN.
                *y = if value < floor { floor } else { value };
            }
        }
    }
}

kernel! {
    fn affine_plus(x: &[f32], residual: &[f32], scale: &[f32], shift: &[f32], floor: f32, y: &mut [f32]) {
        let channels = scale.len();
        let rows = y.chunks_exact_mut(channels).zip(x.chunks_exact(channels).zip(residual.chunks_exact(channels)));
        for (y, (x, residual)) in rows {
            for ((y, (x, residual)), (scale, shift)) in y.iter_mut().zip(x.iter().zip(residual)).zip(scale.iter().zip(shift)) {
                let value = x * scale + shift + residual;
                *y = if value < floor { floor } else { value };
            }
        }
    }
}

kernel! {
    /// g becomes 0 where y is not above 0.
    fn mask(y: &[f32], g: &mut [f32]) {
        for (g, y) in g.iter_mut().zip(y) {
            *g = if *y > 0.0 { *g } else { 0.0 };
        }
    }
}

kernel! {
    /// sums [2 C]: of g, and of g xhat.
    fn gradient_sums(x: &[f32], mean: &[f32], rstd: &[f32], g: &[f32], sums: &mut [f32]) {
        let channels = mean.len();
        sums.fill(0.0);
        let (sum, dot) = sums.split_at_mut(channels);
        for (x, g) in x.chunks_exact(channels).zip(g.chunks_exact(channels)) {
            for i in 0..channels {
                sum[i] += g[i];
                dot[i] += g[i] * ((x[i] - mean[i]) * rstd[i]);
            }
        }
    }
}

kernel! {
    fn input_gradient(x: &[f32], g: &[f32], a: &[f32], b: &[f32], c: &[f32], dx: &mut [f32]) {
        let channels = a.len();
        for (dx, (x, g)) in dx.chunks_exact_mut(channels).zip(x.chunks_exact(channels).zip(g.chunks_exact(channels))) {
            for i in 0..channels {
                dx[i] = g[i] * a[i] + x[i] * b[i] + c[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;

    const SIZES: [(usize, usize); 3] = [(7, 5), (400, 16), (3000, 64)];

    fn inputs(rows: usize, channels: usize) -> [Vec<f32>; 5] {
        // A mean away from 0, as after a convolution.
        let x = normal(1, rows * channels).iter().map(|x| 3.0 * x + 2.0).collect();
        let [residual, dy] = [2, 3].map(|seed| normal(seed, rows * channels));
        let [weight, bias] = [4, 5].map(|seed| normal(seed, channels));
        [x, residual, dy, weight, bias]
    }

    fn all(rows: usize, channels: usize, residual: bool, activation: Activation) -> [Vec<f32>; 5] {
        let [x, added, mut dy, weight, bias] = inputs(rows, channels);
        let mut scratch = vec![f32::NAN; scratch_len(rows, channels)];
        let (mut y, mut mean, mut rstd) = (vec![0.0; x.len()], vec![0.0; channels], vec![0.0; channels]);
        let added = residual.then_some(&added[..]);
        forward_training(&x, &weight, &bias, added, activation, &mut y, &mut mean, &mut rstd, None, &mut scratch);
        let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![0.0; channels], vec![0.0; channels]);
        let saved = Saved { x: &x, y: &y, weight: &weight, mean: &mean, rstd: &rstd, activation };
        let [to_weight, to_bias] = [&mut dweight, &mut dbias].map(|data| Gradient::overwrite(data));
        backward(saved, &mut dy, &mut dx, to_weight, to_bias, &mut scratch);
        [y, dx, dweight, dbias, dy]
    }

    #[test]
    fn forward_and_gradients_are_those_of_the_definition() {
        for (rows, channels) in SIZES {
            for (residual, activation) in [(false, Activation::Identity), (true, Activation::Relu)] {
                let [x, added, dy, weight, bias] = inputs(rows, channels).map(|numbers| to_f64(&numbers));
                let added = residual.then_some(&added[..]);
                let (y, ..) = reference::forward(&x, &weight, &bias, added, activation, f64::from(EPSILON));
                let [dx, dweight, dbias, g] = reference::backward(&x, &y, &weight, activation, f64::from(EPSILON), &dy);
                let expected = [y, dx, dweight, dbias, g];
                at_every_level(|level| {
                    for (index, actual) in all(rows, channels, residual, activation).iter().enumerate() {
                        assert_close(&format!("{level:?} {rows} {channels} {index}"), actual, &expected[index], 3e-5);
                    }
                });
            }
        }
    }

    #[test]
    fn the_references_gradient_is_that_of_differences() {
        let [x, added, dy, weight, bias] = inputs(6, 3).map(|numbers| to_f64(&numbers));
        for activation in [Activation::Identity, Activation::Relu] {
            let run = |x: &[f64], weight: &[f64], bias: &[f64], added: &[f64]| {
                weighted(&reference::forward(x, weight, bias, Some(added), activation, 1e-5).0, &dy)
            };
            let (y, ..) = reference::forward(&x, &weight, &bias, Some(&added), activation, 1e-5);
            let [dx, dweight, dbias, g] = reference::backward(&x, &y, &weight, activation, 1e-5, &dy);
            assert_same_gradient("dx", &dx, &differences(&x, |x| run(x, &weight, &bias, &added)));
            assert_same_gradient("dweight", &dweight, &differences(&weight, |weight| run(&x, weight, &bias, &added)));
            assert_same_gradient("dbias", &dbias, &differences(&bias, |bias| run(&x, &weight, bias, &added)));
            assert_same_gradient("dresidual", &g, &differences(&added, |added| run(&x, &weight, &bias, added)));
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        assert_same_bits_for_any_threads(|| all(3000, 64, true, Activation::Relu).concat());
    }

    #[test]
    fn running_statistics_move_by_pytorchs_rule_and_serve_evaluation() {
        let (x, mut running) = ([1.0, 2.0, 3.0, 6.0], Statistics::new(1));
        let (mut y, mut mean, mut rstd) = ([0.0; 4], [0.0], [0.0]);
        let mut scratch = vec![0.0; scratch_len(4, 1)];
        let statistics = Some(&mut running);
        forward_training(
            &x,
            &[1.0],
            &[0.0],
            None,
            Activation::Identity,
            &mut y,
            &mut mean,
            &mut rstd,
            statistics,
            &mut scratch,
        );
        // Mean 3, unbiased variance 14/3.
        assert!((running.mean[0] - 0.3).abs() < 1e-6 && (running.variance[0] - (0.9 + 0.1 * 14.0 / 3.0)).abs() < 1e-6);
        forward_running(&x, &[2.0], &[1.0], None, Activation::Relu, &running, &mut y);
        let expected = x.map(|x| f64::max(0.0, 2.0 * (f64::from(x) - 0.3) / (0.9f64 + 1.4 / 3.0 + 1e-5).sqrt() + 1.0));
        assert_close("evaluated", &y, &expected, 1e-6);
    }
}
