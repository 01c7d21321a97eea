//! The activations on the CPU: one pass in parallel pieces.

use crate::ops::parallel::PIECE;
use crate::ops::simd::{Level, exp, kernel};
use rayon::prelude::*;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// y = gelu(x), element by element.
pub fn gelu(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "gelu: lengths");
    let level = Level::current();
    y.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(y, x)| gelu_piece(level, x, y));
}

/// dy becomes dx = dy * gelu'(x), in place.
pub fn gelu_backward(x: &[f32], dy: &mut [f32]) {
    assert_eq!(x.len(), dy.len(), "gelu backward: lengths");
    let level = Level::current();
    dy.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(dy, x)| gelu_backward_piece(level, x, dy));
}

/// y = gate / (1 + e^-gate) * up, element by element.
pub fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len(), "swiglu: lengths");
    let level = Level::current();
    y.par_chunks_mut(PIECE)
        .zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)))
        .for_each(|(y, (gate, up))| swiglu_piece(level, gate, up, y));
}

/// Gradients of [`swiglu`] for dy; dgate and dup are overwritten.
pub fn swiglu_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let len = dy.len();
    let lengths = [gate.len(), up.len(), dgate.len(), dup.len()];
    assert!(lengths.iter().all(|&l| l == len), "swiglu backward: lengths");
    let level = Level::current();
    dgate
        .par_chunks_mut(PIECE)
        .zip(dup.par_chunks_mut(PIECE))
        .zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)))
        .zip(dy.par_chunks(PIECE))
        .for_each(|(((dgate, dup), (gate, up)), dy)| swiglu_backward_piece(level, gate, up, dy, dgate, dup));
}

kernel! {
    fn gelu_piece(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            let u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
            *y = x / (1.0 + exp(-2.0 * u));
        }
    }
}

kernel! {
    fn gelu_backward_piece(x: &[f32], dy: &mut [f32]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            let u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
            let inner_slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
            *dy *= sigmoid_product_slope(x, 2.0 * u, 2.0 * inner_slope);
        }
    }
}

/// d/dx of x * sigmoid(v(x)) for v and its slope.
#[inline(always)]
fn sigmoid_product_slope(x: f32, v: f32, v_slope: f32) -> f32 {
    // e^-v is held finite, so that 1 - sigmoid = e^-v * sigmoid keeps its precision and never becomes inf * 0.
    let v = if v < -80.0 { -80.0 } else { v };
    let e = exp(-v);
    let sigmoid = 1.0 / (1.0 + e);
    sigmoid + (x * (e * sigmoid)) * (sigmoid * v_slope)
}

kernel! {
    fn swiglu_piece(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

kernel! {
    fn swiglu_backward_piece(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let inputs = gate.iter().zip(up).zip(dy);
        for (((&gate, up), dy), (dgate, dup)) in inputs.zip(dgate.iter_mut().zip(dup)) {
            *dup = dy * (gate / (1.0 + exp(-gate)));
            *dgate = dy * up * sigmoid_product_slope(gate, gate, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;

    /// Normal numbers, a sweep of the range where the functions bend, and great ones.
    fn inputs(len: usize) -> Vec<f32> {
        let mut x = normal(1, len);
        x.iter_mut().for_each(|x| *x *= 3.0);
        for (i, x) in x.iter_mut().enumerate().take(2001) {
            *x = (i as f32 - 1000.0) * 0.02;
        }
        let great = [0.0, -0.0, 1e-30, -1e-30, 100.0, -100.0, 1e4, -1e4];
        x.iter_mut().zip(great).for_each(|(x, great)| *x = great);
        x
    }

    #[test]
    fn gelu_and_its_slope_match_the_reference_at_every_level() {
        for len in [1, 15, 16, 40_001] {
            let (x, dy) = (inputs(len), normal(2, len));
            let y: Vec<f64> = x.iter().map(|&x| reference::gelu(x.into())).collect();
            let slope = |(&x, &dy): (&f32, &f32)| f64::from(dy) * reference::gelu_slope(x.into());
            let dx: Vec<f64> = x.iter().zip(&dy).map(slope).collect();
            at_every_level(|level| {
                let (mut actual, mut actual_dx) = (vec![7.0; len], dy.clone());
                gelu(&x, &mut actual);
                gelu_backward(&x, &mut actual_dx);
                assert_close(&format!("gelu {level:?}"), &actual, &y, 3e-7);
                assert_close(&format!("gelu' {level:?}"), &actual_dx, &dx, 1e-6);
            });
        }
    }

    #[test]
    fn gelu_keeps_its_relative_precision_in_the_negative_tail() {
        let x: Vec<f32> = (0..500).map(|i| -0.01 * i as f32).collect();
        let mut y = vec![0.0; x.len()];
        gelu(&x, &mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let (x, u) = (f64::from(x), 0.797_884_560_802_865_4 * (f64::from(x) + 0.044715 * f64::from(x).powi(3)));
            let expected = x / (1.0 + (-2.0 * u).exp());
            assert!((f64::from(y) - expected).abs() <= 4e-6 * expected.abs(), "{x}: {y} {expected}");
        }
    }

    #[test]
    fn swiglu_and_its_slopes_match_the_reference_at_every_level() {
        for len in [1, 17, 40_001] {
            let (gate, up, dy) = (inputs(len), normal(2, len), normal(3, len));
            let triple = |i: usize| (f64::from(gate[i]), f64::from(up[i]), f64::from(dy[i]));
            let expect = |f: &dyn Fn(f64, f64, f64) -> f64| -> Vec<f64> {
                (0..len).map(triple).map(|(gate, up, dy)| f(gate, up, dy)).collect()
            };
            let y = expect(&|gate, up, _| reference::swiglu(gate, up));
            let dgate = expect(&|gate, up, dy| dy * reference::swiglu_slopes(gate, up).0);
            let dup = expect(&|gate, up, dy| dy * reference::swiglu_slopes(gate, up).1);
            at_every_level(|level| {
                let [mut y_out, mut dgate_out, mut dup_out] = [(); 3].map(|()| vec![7.0; len]);
                swiglu(&gate, &up, &mut y_out);
                swiglu_backward(&gate, &up, &dy, &mut dgate_out, &mut dup_out);
                assert_close(&format!("y {level:?}"), &y_out, &y, 4e-7);
                assert_close(&format!("dgate {level:?}"), &dgate_out, &dgate, 2e-6);
                assert_close(&format!("dup {level:?}"), &dup_out, &dup, 4e-7);
            });
        }
    }

    #[test]
    fn extreme_inputs_give_limits_and_nan_stays_nan() {
        let x = [f32::INFINITY, f32::NAN, -1e30, 1e30];
        at_every_level(|_| {
            let mut y = [0.0; 4];
            gelu(&x, &mut y);
            assert_eq!((y[0], y[2], y[3]), (f32::INFINITY, 0.0, 1e30));
            assert!(y[1].is_nan());
            let mut slopes = [1.0; 4];
            gelu_backward(&[100.0, -100.0, f32::NAN, 0.0], &mut slopes);
            assert_eq!((slopes[0], slopes[3]), (1.0, 0.5));
            assert!(slopes[1].abs() < 1e-25 && slopes[2].is_nan(), "{slopes:?}");
            swiglu(&x, &[1.0; 4], &mut y);
            assert_eq!((y[0], y[2], y[3]), (f32::INFINITY, 0.0, 1e30));
            assert!(y[1].is_nan());
        });
    }

    #[test]
    fn every_instruction_set_and_any_number_of_threads_give_the_same_bits() {
        let x = inputs(40_001);
        let all = || {
            let (mut y, mut dx) = (vec![0.0; x.len()], x.clone());
            gelu(&x, &mut y);
            gelu_backward(&x, &mut dx);
            [y, dx].concat()
        };
        assert_same_bits_for_any_threads(all);
        let expected = all();
        at_every_level(|level| assert!(all() == expected, "{level:?}"));
    }

    #[test]
    fn the_references_slopes_are_those_of_finite_differences() {
        let x: Vec<f64> = (-20..=20).map(|i| f64::from(i) * 0.17).collect();
        let slopes: Vec<f64> = x.iter().map(|&x| reference::gelu_slope(x)).collect();
        let gelu_sum = |x: &[f64]| x.iter().map(|&x| reference::gelu(x)).sum();
        assert_same_gradient("gelu'", &slopes, &differences(&x, gelu_sum));
        let up: Vec<f64> = x.iter().map(|x| x * 0.7 + 0.3).collect();
        let swiglu_sum = |gate: &[f64], up: &[f64]| gate.iter().zip(up).map(|(&g, &u)| reference::swiglu(g, u)).sum();
        let (dgate, dup): (Vec<f64>, Vec<f64>) =
            x.iter().zip(&up).map(|(&gate, &up)| reference::swiglu_slopes(gate, up)).unzip();
        assert_same_gradient("dgate", &dgate, &differences(&x, |gate| swiglu_sum(gate, &up)));
        assert_same_gradient("dup", &dup, &differences(&up, |up| swiglu_sum(&x, up)));
    }
}
