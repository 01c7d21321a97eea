//! The activations on the CPU: one pass in parallel pieces.

use crate::ops::parallel::PIECE;
use crate::ops::simd::{Level, exp, kernel};
use crate::ops::values::each_kind;
use crate::ops::{Number, Values, ValuesMut};
use rayon::prelude::*;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// Where GELU has long been a straight line.
const FLAT: f32 = 1e3;
const CUBIC: f32 = 0.044_715;

/// y = gelu(x), element by element.
pub fn gelu<'a>(x: impl Into<Values<'a>>, y: impl Into<ValuesMut<'a>>) {
    each_kind!(Values, x.into(), x => each_kind!(ValuesMut, y.into(), y => {
        assert_eq!(x.len(), y.len(), "gelu: lengths");
        let level = Level::current();
        y.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(y, x)| gelu_piece(level, x, y));
    }));
}

/// dx = dy * gelu'(x), and gelu(x) once more in y, with the bits of [`gelu`].
pub fn gelu_backward<'a>(
    x: impl Into<Values<'a>>,
    dy: &[f32],
    dx: impl Into<ValuesMut<'a>>,
    y: impl Into<ValuesMut<'a>>,
) {
    let (x, dx, y) = (x.into(), dx.into(), y.into());
    assert!([x.len(), dx.len(), y.len()].iter().all(|&len| len == dy.len()), "gelu backward: lengths");
    let level = Level::current();
    each_kind!(Values, x, x => each_kind!(ValuesMut, dx, dx => each_kind!(ValuesMut, y, y => {
        dx.par_chunks_mut(PIECE)
            .zip(y.par_chunks_mut(PIECE))
            .zip(x.par_chunks(PIECE).zip(dy.par_chunks(PIECE)))
            .for_each(|((dx, y), (x, dy))| gelu_backward_piece(level, x, dy, dx, y));
    })));
}

/// y = gate / (1 + e^-gate) * up, element by element.
pub fn swiglu<'a>(gate: impl Into<Values<'a>>, up: impl Into<Values<'a>>, y: impl Into<ValuesMut<'a>>) {
    let (gate, up, y) = (gate.into(), up.into(), y.into());
    assert!(gate.len() == y.len() && up.len() == y.len(), "swiglu: lengths");
    let level = Level::current();
    each_kind!(Values, gate, gate => each_kind!(Values, up, up => each_kind!(ValuesMut, y, y => {
        y.par_chunks_mut(PIECE)
            .zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)))
            .for_each(|(y, (gate, up))| swiglu_piece(level, gate, up, y));
    })));
}

/// What [`swiglu_backward`] writes; all of one kind.
pub struct SwigluGradients<'a> {
    pub dgate: ValuesMut<'a>,
    pub dup: ValuesMut<'a>,
    /// [`swiglu`] once more, with its bits.
    pub y: ValuesMut<'a>,
}

/// Gradients of [`swiglu`] for dy.
///
/// # Panics
/// When lengths differ, or some operands are f32 and others bf16 (dy is always f32).
pub fn swiglu_backward<'a>(
    gate: impl Into<Values<'a>>,
    up: impl Into<Values<'a>>,
    dy: &[f32],
    gradients: SwigluGradients<'a>,
) {
    match (gate.into(), up.into(), gradients) {
        (
            Values::F32(gate),
            Values::F32(up),
            SwigluGradients { dgate: ValuesMut::F32(dgate), dup: ValuesMut::F32(dup), y: ValuesMut::F32(y) },
        ) => swiglu_backward_of(gate, up, dy, dgate, dup, y),
        (
            Values::Bf16(gate),
            Values::Bf16(up),
            SwigluGradients { dgate: ValuesMut::Bf16(dgate), dup: ValuesMut::Bf16(dup), y: ValuesMut::Bf16(y) },
        ) => swiglu_backward_of(gate, up, dy, dgate, dup, y),
        _ => panic!("swiglu backward: operands of both kinds"),
    }
}

fn swiglu_backward_of<N: Number>(gate: &[N], up: &[N], dy: &[f32], dgate: &mut [N], dup: &mut [N], y: &mut [N]) {
    let lengths = [gate.len(), up.len(), dgate.len(), dup.len(), y.len()];
    assert!(lengths.iter().all(|&len| len == dy.len()), "swiglu backward: lengths");
    let level = Level::current();
    dgate
        .par_chunks_mut(PIECE)
        .zip(dup.par_chunks_mut(PIECE).zip(y.par_chunks_mut(PIECE)))
        .zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)))
        .zip(dy.par_chunks(PIECE))
        .for_each(|(((dgate, (dup, y)), (gate, up)), dy)| {
            swiglu_backward_piece(level, gate, up, dy, dgate, dup, y);
        });
}

kernel! {
    fn gelu_piece<X, Y>(x: &[X], y: &mut [Y]) {
        for (y, x) in y.iter_mut().zip(x) {
            let x = x.widen();
            let u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
            *y = Y::round(x / (1.0 + exp(-(2.0 * u))));
        }
    }
}

kernel! {
    fn gelu_backward_piece<X, D, Y>(x: &[X], dy: &[f32], dx: &mut [D], y: &mut [Y]) {
        for ((x, dy), (dx, y)) in x.iter().zip(dy).zip(dx.iter_mut().zip(y)) {
            let x = x.widen();
            let u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
            let e = exp(-(2.0 * u));
            *y = Y::round(x / (1.0 + e));
            // Beyond it the slope is 1 or 0, and x^2 would overflow. A NaN stays one.
            let x = x.clamp(-FLAT, FLAT);
            let inner_slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
            *dx = D::round(dy * sigmoid_product_slope(x, e, 2.0 * inner_slope));
        }
    }
}

/// d/dx of x * sigmoid(v(x)), for e = e^-v and v's slope.
#[inline(always)]
fn sigmoid_product_slope(x: f32, e: f32, v_slope: f32) -> f32 {
    // e is held finite (at e^80), so that 1 - sigmoid = e * sigmoid keeps its precision and never becomes inf * 0.
    let e = if e > 5.540_622_4e34 { 5.540_622_4e34 } else { e };
    let sigmoid = 1.0 / (1.0 + e);
    sigmoid + (x * (e * sigmoid)) * (sigmoid * v_slope)
}

kernel! {
    fn swiglu_piece<G, U, Y>(gate: &[G], up: &[U], y: &mut [Y]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            let gate = gate.widen();
            *y = Y::round(gate / (1.0 + exp(-gate)) * up.widen());
        }
    }
}

kernel! {
    fn swiglu_backward_piece<N>(
        gate: &[N], up: &[N], dy: &[f32], dgate: &mut [N], dup: &mut [N], y: &mut [N],
    ) {
        let inputs = gate.iter().zip(up).zip(dy);
        for (((gate, up), dy), (dgate, (dup, y))) in inputs.zip(dgate.iter_mut().zip(dup.iter_mut().zip(y))) {
            let (gate, up) = (gate.widen(), up.widen());
            let e = exp(-gate);
            let silu = gate / (1.0 + e);
            *y = N::round(silu * up);
            *dup = N::round(dy * silu);
            *dgate = N::round(dy * up * sigmoid_product_slope(gate, e, 1.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::ops::testing::*;
    use half::bf16;

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

    fn gradients<'a>(dgate: &'a mut Vec<f32>, dup: &'a mut Vec<f32>, y: &'a mut Vec<f32>) -> SwigluGradients<'a> {
        SwigluGradients { dgate: dgate.into(), dup: dup.into(), y: y.into() }
    }

    #[test]
    fn in_bf16_the_results_are_those_in_f32_of_the_widened_inputs_rounded_once() {
        let (x, up, dy) = (inputs(40_001), normal(2, 40_001), normal(3, 40_001));
        let [x_stored, up_stored] = [&x, &up].map(|x| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        let [x, up] = [&x_stored, &up_stored].map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        let [mut y, mut dx, mut dgate, mut dup, mut product] = [(); 5].map(|()| vec![7.0; x.len()]);
        gelu(&x, &mut y);
        gelu_backward(&x, &dy, &mut dx, &mut vec![0.0; x.len()]);
        swiglu_backward(&x, &up, &dy, gradients(&mut dgate, &mut dup, &mut product));
        let rounded = |numbers: &[f32]| numbers.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<_>>();
        let bits = |numbers: &[bf16]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        at_every_level(|level| {
            let mut stored = [(); 7].map(|()| vec![bf16::ONE; x.len()]);
            let [y16, dx16, again, dgate16, dup16, product16, forward16] = stored.each_mut().map(|v| &mut v[..]);
            gelu(&x_stored[..], &mut y16[..]);
            gelu_backward(&x_stored[..], &dy, &mut dx16[..], &mut again[..]);
            let to = SwigluGradients { dgate: dgate16.into(), dup: dup16.into(), y: product16.into() };
            swiglu_backward(&x_stored[..], &up_stored[..], &dy, to);
            swiglu(&x_stored[..], &up_stored[..], forward16);
            let expected = [&y, &dx, &y, &dgate, &dup, &product, &product];
            for (place, (stored, expected)) in stored.iter().zip(expected).enumerate() {
                assert!(bits(stored) == rounded(expected), "{level:?}, result {place}");
            }
        });
    }

    #[test]
    fn gelu_and_its_slope_match_the_reference_at_every_level() {
        for len in [1, 15, 16, 40_001] {
            let (x, dy) = (inputs(len), normal(2, len));
            let y: Vec<f64> = x.iter().map(|&x| reference::gelu(x.into())).collect();
            let slope = |(&x, &dy): (&f32, &f32)| f64::from(dy) * reference::gelu_slope(x.into());
            let dx: Vec<f64> = x.iter().zip(&dy).map(slope).collect();
            at_every_level(|level| {
                let [mut actual, mut actual_dx, mut again] = [(); 3].map(|()| vec![7.0; len]);
                gelu(&x, &mut actual);
                gelu_backward(&x, &dy, &mut actual_dx, &mut again);
                assert!(actual == again, "gelu once more {level:?}");
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
                let [mut y_out, mut dgate_out, mut dup_out, mut again] = [(); 4].map(|()| vec![7.0; len]);
                swiglu(&gate, &up, &mut y_out);
                swiglu_backward(&gate, &up, &dy, gradients(&mut dgate_out, &mut dup_out, &mut again));
                assert!(y_out == again, "swiglu once more {level:?}");
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
            gelu(&x[..], &mut y[..]);
            assert_eq!((y[0], y[2], y[3]), (f32::INFINITY, 0.0, 1e30));
            assert!(y[1].is_nan());
            let mut slopes = [7.0; 4];
            gelu_backward(&[100.0, -100.0, f32::NAN, 0.0][..], &[1.0; 4], &mut slopes[..], &mut [0.0; 4][..]);
            assert_eq!((slopes[0], slopes[3]), (1.0, 0.5));
            assert!(slopes[1].abs() < 1e-25 && slopes[2].is_nan(), "{slopes:?}");
            // Also where x^2 overflows.
            for x in [1e4, 1e12, 1e20, f32::MAX, f32::INFINITY] {
                gelu_backward(&[x, -x][..], &[1.0; 2], &mut slopes[..2], &mut [0.0; 2][..]);
                assert!(slopes[0] == 1.0 && slopes[1].abs() < 1e-25, "{x}: {slopes:?}");
            }
            swiglu(&x[..], &[1.0; 4][..], &mut y[..]);
            assert_eq!((y[0], y[2], y[3]), (f32::INFINITY, 0.0, 1e30));
            assert!(y[1].is_nan());
        });
    }

    #[test]
    fn every_instruction_set_and_any_number_of_threads_give_the_same_bits() {
        let x = inputs(40_001);
        let all = || {
            let [mut y, mut dx, mut again] = [(); 3].map(|()| vec![0.0; x.len()]);
            gelu(&x, &mut y);
            gelu_backward(&x, &x, &mut dx, &mut again);
            [y, dx, again].concat()
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
