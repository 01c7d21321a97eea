//! What the tests of the operations share: numbers, comparisons, pools of several sizes, gradients by differences.

use super::simd::{Level, available, with_level};
use crate::random::{Stream, fill_normal, generator};

/// `len` numbers from N(0, 1), the same for the same `seed`.
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    fill_normal(&mut generator(seed, Stream::Init), 1.0, &mut values);
    values
}

pub fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Fails where |actual - expected| > tolerance * (1 + |expected|), naming the place.
#[track_caller]
pub fn assert_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let close = (f64::from(a) - e).abs() <= tolerance * (1.0 + e.abs());
        assert!(close, "{what}[{i}] is {a}, the reference says {e}");
    }
}

/// Calls `check` once for each instruction set that this machine has, with that set in force on this thread.
pub fn at_every_level(mut check: impl FnMut(Level)) {
    for level in available() {
        with_level(level, || check(level));
    }
}

/// Fails unless `run` gives the same bits in pools of 1, 2 and 7 threads.
#[track_caller]
pub fn assert_same_bits_for_any_threads(run: impl Fn() -> Vec<f32> + Sync) {
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        pool.install(|| run().into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let one = bits(1);
    for threads in [2, 7] {
        assert!(one == bits(threads), "{threads} threads give other bits than one");
    }
}

/// The gradient of `loss` at `x` by central differences in f64 (error about 1e-9 for smooth losses of order 1).
pub fn differences(x: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    let len = x.len();
    let slope = |i: usize| {
        let middle = x[i];
        x[i] = middle + STEP;
        let above = loss(&x);
        x[i] = middle - STEP;
        let below = loss(&x);
        x[i] = middle;
        (above - below) / (2.0 * STEP)
    };
    (0..len).map(slope).collect()
}

/// Fails where two f64 vectors differ by more than 1e-7 * (1 + |expected|).
#[track_caller]
pub fn assert_same_gradient(what: &str, actual: &[f64], by_differences: &[f64]) {
    assert_eq!(actual.len(), by_differences.len(), "{what}: lengths");
    for (i, (a, e)) in actual.iter().zip(by_differences).enumerate() {
        assert!((a - e).abs() <= 1e-7 * (1.0 + e.abs()), "{what}[{i}] is {a}, differences say {e}");
    }
}

/// Sum of products: the loss whose gradient with respect to `y` is `weights`.
pub fn weighted(y: &[f64], weights: &[f64]) -> f64 {
    y.iter().zip(weights).map(|(y, w)| y * w).sum()
}
