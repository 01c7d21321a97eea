//! Vector code without intrinsics: one source, compiled for AVX-512, for AVX2 and for the build's own target, and
//! chosen when the program runs.
//!
//! The three versions of a kernel round alike (no fused multiply-add, sums in lanes of [`LANES`] whatever the width of
//! the registers), so that its result is the same, bit for bit, on every processor.

use super::Number;

/// Partial sums that a reduction keeps: the f32 lanes of the widest register.
pub const LANES: usize = 16;

/// An instruction set that this processor has. A value exists only for a set that was found at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The best set of this processor; the standard library caches what it finds.
    pub fn current() -> Self {
        #[cfg(test)]
        if let Some(level) = FORCED.get() {
            return level;
        }
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Self(Set::Avx512);
            }
            if has_avx2() {
                return Self(Set::Avx2);
            }
        }
        Self(Set::Portable)
    }

    pub(super) fn set(self) -> Set {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Defines a kernel: a function with one more argument, the [`Level`], that runs the version for that set. Its type
/// parameters are kinds of [`Number`](super::Number).
macro_rules! kernel {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident$(<$($number:ident),+>)?($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments, reason = "a kernel's operands are its arguments")]
        $visibility fn $name$(<$($number: $crate::ops::Number),+>)?(level: $crate::ops::simd::Level, $($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn portable$(<$($number: $crate::ops::Number),+>)?($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2$(<$($number: $crate::ops::Number),+>)?($($argument: $type),*) $(-> $result)? {
                portable($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512$(<$($number: $crate::ops::Number),+>)?($($argument: $type),*) $(-> $result)? {
                portable($($argument),*)
            }

            match level.set() {
                $crate::ops::simd::Set::Portable => portable($($argument),*),
                // SAFETY: a `Level` of this set exists only where the processor has it.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::simd::Set::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::simd::Set::Avx512 => unsafe { avx512($($argument),*) },
            }
        }
    };
}
pub(super) use kernel;

/// The sum of a vector's lanes, as a tree of fixed shape.
#[inline(always)]
pub fn lanes_sum(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of `f` over `x`, in lanes.
#[inline(always)]
pub fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] += f(block[i]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane += f(value);
    }
    lanes_sum(lanes)
}

/// Sum of the products of two vectors of equal length, in lanes.
#[inline(always)]
pub fn dot<N: Number>(x: &[N], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((x, x_tail), (y, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x.iter().zip(y) {
        for i in 0..LANES {
            lanes[i] += x[i].widen() * y[i];
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(x_tail).zip(y_tail) {
        *lane += x.widen() * y;
    }
    lanes_sum(lanes)
}

/// The greatest number of `x`; -inf for none. NaN are passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] = greater(lanes[i], block[i]);
        }
    }
    lanes.into_iter().chain(tail.iter().copied()).fold(f32::NEG_INFINITY, greater)
}

/// e^x with a relative error below 2e-7: 0 below the smallest subnormal, +inf above the greatest f32, NaN for NaN.
///
/// x = n ln 2 + f with |f| <= ln(2)/2; e^f is a polynomial of degree 6 (relative error 1e-8, interpolated at Chebyshev
/// nodes); 2^n is multiplied in two halves, so that overflow and gradual underflow come out as IEEE 754 has them.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4; // 355/512: n * LN_2_HIGH is exact
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
    // Comparisons that are false for NaN leave it in place.
    let x = if x > 90.0 { 90.0 } else { x };
    let x = if x < -105.0 { -105.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let f = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let tail = 8.363_203e-3 + f * 1.392_621_3e-3;
    let tail = 0.166_665_77 + f * (4.166_655_4e-2 + f * tail);
    let power = 1.0 + (f + f * f * (0.5 + f * tail));
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = exponent >> 1;
    let two_to = |e: i32| f32::from_bits((e.wrapping_add(127) << 23) as u32);
    power * two_to(half) * two_to(exponent.wrapping_sub(half))
}

/// row becomes e^(row - greatest); the sum of it, in lanes.
#[inline(always)]
pub fn exp_in_place(row: &mut [f32], greatest: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (blocks, tail) = row.as_chunks_mut::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            block[i] = exp(block[i] - greatest);
            lanes[i] += block[i];
        }
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *value = exp(*value - greatest);
        *lane += *value;
    }
    lanes_sum(lanes)
}

/// The part of `buffer` that begins on a boundary of 64 bytes (a cache line, and the widest register).
pub fn aligned(buffer: &mut [f32]) -> &mut [f32] {
    let skip = buffer.as_ptr().align_offset(64).min(buffer.len());
    &mut buffer[skip..]
}

#[cfg(test)]
thread_local! {
    static FORCED: std::cell::Cell<Option<Level>> = const { std::cell::Cell::new(None) };
}

/// Every set that this machine has, the portable one first.
#[cfg(test)]
pub fn available() -> Vec<Level> {
    let mut levels = vec![Level(Set::Portable)];
    #[cfg(target_arch = "x86_64")]
    {
        levels.extend(has_avx2().then_some(Level(Set::Avx2)));
        levels.extend(has_avx512().then_some(Level(Set::Avx512)));
    }
    levels
}

/// Runs `f` with [`Level::current`] fixed on this thread.
#[cfg(test)]
pub fn with_level<R>(level: Level, f: impl FnOnce() -> R) -> R {
    FORCED.set(Some(level));
    let result = f();
    FORCED.set(None);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    kernel! {
        fn exp_all(x: &[f32], y: &mut [f32]) {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = exp(x);
            }
        }
    }

    #[test]
    fn exp_is_within_two_ten_millionths_of_f64_over_its_whole_range() {
        let x: Vec<f32> = (-870_000..=887_000).map(|i| i as f32 * 1e-4).collect();
        for level in available() {
            let mut y = vec![0.0; x.len()];
            exp_all(level, &x, &mut y);
            let error = |(x, y): (&f32, &f32)| (f64::from(*y) / f64::from(*x).exp() - 1.0).abs();
            let worst = x.iter().zip(&y).map(error).fold(0.0, f64::max);
            assert!(worst < 2e-7, "{level:?}: {worst:e}");
        }
    }

    #[test]
    fn exp_of_extreme_numbers_is_what_ieee_754_says() {
        let x = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 89.0, 1e30, -104.5, -1e30, 0.0, -0.0, -100.0];
        for level in available() {
            let mut y = [0.0; 10];
            exp_all(level, &x, &mut y);
            assert_eq!(y[..2], [f32::INFINITY, 0.0], "{level:?}");
            assert!(y[2].is_nan());
            assert_eq!(y[3..9], [f32::INFINITY, f32::INFINITY, 0.0, 0.0, 1.0, 1.0], "{level:?}");
            assert!((y[9] - (-100.0f32).exp()).abs() <= 2.0 * f32::from_bits(1), "{level:?}: {:e}", y[9]);
        }
    }

    #[test]
    fn a_maximum_passes_over_nan_and_is_minus_infinity_for_none() {
        let mut x = vec![-5.0f32; 40];
        (x[3], x[17], x[39]) = (f32::NAN, 2.0, 3.0);
        assert_eq!((max(&x), max(&[]), max(&[f32::NAN])), (3.0, f32::NEG_INFINITY, f32::NEG_INFINITY));
    }
}
