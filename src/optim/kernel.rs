//! The passes over flat f32 buffers on the CPU: reduce, predict, update.
//!
//! A buffer is cut into chunks of a fixed size, every chunk sums in a fixed number of f64 lanes, and the chunks' sums
//! are added in their order. So the bits depend on neither the number of threads nor the instruction set: the inner
//! loops are written once, are compiled for AVX-512, AVX2 and the portable baseline, and use no fused multiply-add
//! (a product of two f32 is exact in f64, so the sums would not change by it). What the update pass writes, it has just
//! read, so stores around the cache would save nothing.

use crate::ops::Number;
use crate::params::WeightsMut;
use half::bf16;
use rayon::prelude::*;
use std::array;
use std::ops::Range;

/// Elements a thread takes at once.
const CHUNK: usize = 1 << 16;

/// Elements handled together; also the number of partial sums of a chunk.
const LANES: usize = 16;

/// The arithmetic of one method for one element. `state[0]` is the velocity, and what it becomes never depends on the
/// learning rate after the gate, because the gate is a function of it.
pub(super) trait Rule<const N: usize>: Copy + Send + Sync {
    /// (gradient as summed by the backward pass, weight, state) -> (new weight, new state)
    fn apply(self, gradient: f32, weight: f32, state: [f32; N]) -> (f32, [f32; N]);
}

/// What the reduction pass sums over one range.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sums {
    /// ||g||^2 of the gradients as they stand, unscaled.
    pub gradient_sq: f64,
    /// <velocity, g>; 0 where the pass was not given the velocity.
    pub velocity_gradient: f64,
}

/// What [`predict`] sums.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Measure {
    /// |new velocity|^power.
    Velocity { power: f64 },
    /// |scale * gradient|^power.
    Gradient { scale: f64, power: f64 },
}

/// The instruction sets that the loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Every level that this machine has, the best last.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                levels.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                levels.push(Self::Avx512);
            }
        }
        levels
    }

    pub fn best() -> Self {
        static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self::Portable))
    }
}

/// Compiles `$body` for every level under the name `$name`, which takes the level first.
macro_rules! for_every_level {
    (fn $name:ident[$($generics:tt)*]($($argument:ident: $type:ty),* $(,)?) -> $result:ty = $body:path;) => {
        fn $name<$($generics)*>(level: Level, $($argument: $type),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2<$($generics)*>($($argument: $type),*) -> $result {
                $body($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl")]
            fn avx512<$($generics)*>($($argument: $type),*) -> $result {
                $body($($argument),*)
            }
            match level {
                Level::Portable => $body($($argument),*),
                // SAFETY: a Level is made only by `Level::available`, which asks the processor first.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512($($argument),*) },
            }
        }
    };
}

for_every_level! { fn reduce_chunk[](gradient: &[f32], velocity: Option<&[f32]>) -> Sums = reduce_body; }
for_every_level! {
    fn predict_chunk[const N: usize, R: Rule<N>](
        rule: R, measure: Measure, gradient: &[f32], weight: &[f32], state: [&[f32]; N],
    ) -> f64 = predict_body;
}
for_every_level! {
    fn update_chunk[const N: usize, R: Rule<N>](
        rule: R, gradient: &[f32], weights: WeightsMut, state: [&mut [f32]; N],
    ) -> f64 = update_body;
}

/// Lanes to one number, in a fixed tree.
#[inline(always)]
fn total(lanes: [f64; LANES]) -> f64 {
    // Hidden from the compiler, which would otherwise cut the loop's vectors to the shape of this tree.
    let mut lanes = std::hint::black_box(lanes);
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The last, short block, filled up with zeros.
#[inline(always)]
fn padded(tail: &[f32]) -> [f32; LANES] {
    let mut block = [0.0; LANES];
    block[..tail.len()].copy_from_slice(tail);
    block
}

/// Adds the products of two blocks to the lanes' sums. A product of two f32 is exact in f64.
#[inline(always)]
fn add_products(sums: &mut [f64; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for lane in 0..LANES {
        sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
    }
}

#[inline(always)]
fn reduce_body(gradient: &[f32], velocity: Option<&[f32]>) -> Sums {
    let (blocks, tail) = gradient.as_chunks::<LANES>();
    let (mut squares, mut products) = ([0.0f64; LANES], [0.0f64; LANES]);
    if let Some(velocity) = velocity {
        let (velocity_blocks, velocity_tail) = velocity.as_chunks::<LANES>();
        for (block, velocity) in blocks.iter().zip(velocity_blocks) {
            add_products(&mut squares, block, block);
            add_products(&mut products, block, velocity);
        }
        add_products(&mut products, &padded(tail), &padded(velocity_tail));
    } else {
        for block in blocks {
            add_products(&mut squares, block, block);
        }
    }
    add_products(&mut squares, &padded(tail), &padded(tail));
    Sums { gradient_sq: total(squares), velocity_gradient: total(products) }
}

#[inline(always)]
fn predict_body<const N: usize, R: Rule<N>>(
    rule: R,
    measure: Measure,
    gradient: &[f32],
    weight: &[f32],
    state: [&[f32]; N],
) -> f64 {
    let mut sums = [0.0f64; LANES];
    for (index, (&gradient, &weight)) in gradient.iter().zip(weight).enumerate() {
        let (size, power) = match measure {
            Measure::Gradient { scale, power } => (f64::from(gradient) * scale, power),
            Measure::Velocity { power } => {
                let (_, after) = rule.apply(gradient, weight, array::from_fn(|k| state[k][index]));
                (f64::from(after[0]), power)
            }
        };
        sums[index % LANES] += if power == 2.0 { size * size } else { size.abs().powf(power) };
    }
    total(sums)
}

#[inline(always)]
fn update_body<const N: usize, R: Rule<N>>(
    rule: R,
    gradient: &[f32],
    weights: WeightsMut,
    state: [&mut [f32]; N],
) -> f64 {
    let (gradient_blocks, gradient_tail) = gradient.as_chunks::<LANES>();
    let (weight_blocks, weight_tail) = weights.exact.as_chunks_mut::<LANES>();
    let (rounded_blocks, rounded_tail) = weights.rounded.unwrap_or_default().as_chunks_mut::<LANES>();
    let mut state_blocks: [&mut [[f32; LANES]]; N] = array::from_fn(|_| &mut [][..]);
    let mut state_tails: [&mut [f32]; N] = array::from_fn(|_| &mut [][..]);
    for (k, part) in state.into_iter().enumerate() {
        (state_blocks[k], state_tails[k]) = part.as_chunks_mut::<LANES>();
    }
    let mut sums = [0.0f64; LANES];
    // Blocks go through local arrays, so that the compiler knows that loads and stores do not overlap.
    for (index, (gradient, weight)) in gradient_blocks.iter().zip(weight_blocks).enumerate() {
        let before: [[f32; LANES]; N] = array::from_fn(|k| state_blocks[k][index]);
        let (new_weight, after) = apply_block(rule, gradient, weight, &before);
        add_products(&mut sums, &after[0], &after[0]);
        *weight = new_weight;
        // There are either as many blocks of bf16 as of weights, or none.
        if let Some(rounded) = rounded_blocks.get_mut(index) {
            rounded.iter_mut().zip(&new_weight).for_each(|(rounded, &weight)| *rounded = bf16::round(weight));
        }
        for k in 0..N {
            state_blocks[k][index] = after[k];
        }
    }
    let rest = gradient_tail.len();
    let before: [[f32; LANES]; N] = array::from_fn(|k| padded(state_tails[k]));
    let (new_weight, after) = apply_block(rule, &padded(gradient_tail), &padded(weight_tail), &before);
    weight_tail.copy_from_slice(&new_weight[..rest]);
    rounded_tail.iter_mut().zip(new_weight).for_each(|(rounded, weight)| *rounded = bf16::round(weight));
    for (tail, block) in state_tails.iter_mut().zip(&after) {
        tail.copy_from_slice(&block[..rest]);
    }
    // What a rule makes of the filling must not count.
    let kept = padded(&after[0][..rest]);
    add_products(&mut sums, &kept, &kept);
    total(sums)
}

#[inline(always)]
fn apply_block<const N: usize, R: Rule<N>>(
    rule: R,
    gradient: &[f32; LANES],
    weight: &[f32; LANES],
    state: &[[f32; LANES]; N],
) -> ([f32; LANES], [[f32; LANES]; N]) {
    let mut new_weight = [0.0; LANES];
    let mut after = [[0.0; LANES]; N];
    for lane in 0..LANES {
        let (weight, state) = rule.apply(gradient[lane], weight[lane], array::from_fn(|k| state[k][lane]));
        new_weight[lane] = weight;
        for k in 0..N {
            after[k][lane] = state[k];
        }
    }
    (new_weight, after)
}

/// The chunks of `ranges`, each with the place of its range.
fn chunks(ranges: &[Range<usize>]) -> Vec<(usize, Range<usize>)> {
    let mut chunks = Vec::new();
    for (place, range) in ranges.iter().enumerate() {
        let starts = range.clone().step_by(CHUNK);
        chunks.extend(starts.map(|start| (place, start..range.end.min(start + CHUNK))));
    }
    chunks
}

/// Adds the chunks' sums to one per range, in the chunks' order.
fn by_range(ranges: usize, parts: &[(usize, f64)]) -> Vec<f64> {
    let mut sums = vec![0.0; ranges];
    parts.iter().for_each(|&(place, part)| sums[place] += part);
    sums
}

/// ||g||^2 and, where `velocity` is given, <velocity, g> of every range: 4 or 8 bytes an element.
pub(super) fn reduce(level: Level, ranges: &[Range<usize>], gradient: &[f32], velocity: Option<&[f32]>) -> Vec<Sums> {
    let part = |(place, range): (usize, Range<usize>)| {
        (place, reduce_chunk(level, &gradient[range.clone()], velocity.map(|velocity| &velocity[range])))
    };
    let parts: Vec<(usize, Sums)> = chunks(ranges).into_par_iter().map(part).collect();
    let mut sums = vec![Sums::default(); ranges.len()];
    for (place, part) in parts {
        sums[place].gradient_sq += part.gradient_sq;
        sums[place].velocity_gradient += part.velocity_gradient;
    }
    sums
}

/// The sum that a gate asks for where no identity gives it, of every range; changes nothing.
pub(super) fn predict<const N: usize, R: Rule<N>>(
    level: Level,
    ranges: &[(Range<usize>, R)],
    measure: Measure,
    gradient: &[f32],
    weight: &[f32],
    state: [&[f32]; N],
) -> Vec<f64> {
    let part = |(place, range): (usize, Range<usize>)| {
        let state = state.map(|part| &part[range.clone()]);
        let (gradient, weight) = (&gradient[range.clone()], &weight[range]);
        (place, predict_chunk(level, ranges[place].1, measure, gradient, weight, state))
    };
    let places: Vec<Range<usize>> = ranges.iter().map(|(range, _)| range.clone()).collect();
    let parts: Vec<_> = chunks(&places).into_par_iter().map(part).collect();
    by_range(ranges.len(), &parts)
}

/// Applies to every range its rule, writes the bf16 copy of the weights beside them, and gives ||new velocity||^2 of
/// every range. The ranges ascend without overlap; what lies between them stays as it is.
pub(super) fn update<const N: usize, R: Rule<N>>(
    level: Level,
    ranges: &[(Range<usize>, R)],
    gradient: &[f32],
    weights: WeightsMut,
    state: [&mut [f32]; N],
) -> Vec<f64> {
    struct Work<'a, const N: usize> {
        place: usize,
        gradient: &'a [f32],
        weights: WeightsMut<'a>,
        state: [&'a mut [f32]; N],
    }
    /// Takes `range` off the front of `rest`, of which `from` elements are gone already.
    fn take<'a, T>(rest: &mut &'a mut [T], from: usize, range: &Range<usize>) -> &'a mut [T] {
        let (taken, remaining) = std::mem::take(rest).split_at_mut(range.end - from);
        *rest = remaining;
        &mut taken[range.start - from..]
    }
    let places: Vec<Range<usize>> = ranges.iter().map(|(range, _)| range.clone()).collect();
    let (WeightsMut { mut exact, mut rounded }, mut state, mut from) = (weights, state, 0);
    let mut work = Vec::new();
    for (place, range) in chunks(&places) {
        work.push(Work {
            place,
            gradient: &gradient[range.clone()],
            weights: WeightsMut {
                exact: take(&mut exact, from, &range),
                rounded: rounded.as_mut().map(|rounded| take(rounded, from, &range)),
            },
            state: state.each_mut().map(|part| take(part, from, &range)),
        });
        from = range.end;
    }
    let part = |work: Work<N>| {
        (work.place, update_chunk(level, ranges[work.place].1, work.gradient, work.weights, work.state))
    };
    let parts: Vec<_> = work.into_par_iter().map(part).collect();
    by_range(ranges.len(), &parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Stream, fill_normal, generator};

    /// A rule that divides, takes roots and compares, and makes something of nothing.
    #[derive(Clone, Copy)]
    struct Mixed(f32);

    impl Rule<2> for Mixed {
        #[inline(always)]
        fn apply(self, gradient: f32, weight: f32, [first, second]: [f32; 2]) -> (f32, [f32; 2]) {
            let first = 0.9 * first + 0.1 * gradient + 0.01;
            let second = 0.99 * second + 0.01 * (gradient * gradient);
            let sign = if first > 0.0 { 1.0 } else { -1.0 };
            (weight - self.0 * (first / (second.sqrt() + 1e-8)).abs().min(0.7) * sign, [first, second])
        }
    }

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut numbers = vec![0.0; len];
        fill_normal(&mut generator(seed, Stream::Init), 1.0, &mut numbers);
        numbers
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * b.abs().max(1.0)
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        println!("levels here: {:?}", Level::available());
        for len in [0, 1, 15, 16, 17, 333, CHUNK + 3, 2 * CHUNK + 77] {
            let (gradient, weight) = (random(len, 1), random(len, 2));
            let (first, second) = (random(len, 3), random(len, 4).iter().map(|x| x * x).collect::<Vec<_>>());
            let half = len / 2;
            let places = [0..half, half..len];
            let rules = [(0..half, Mixed(0.1)), (half..len, Mixed(0.2))];
            let run = |level: Level| {
                let mut all = [weight.clone(), first.clone(), second.clone()];
                let mut copy = vec![bf16::ZERO; len];
                let [w, a, b] = &mut all;
                let with = reduce(level, &places, &gradient, Some(&first));
                let without = reduce(level, &places, &gradient, None);
                let measures = [Measure::Velocity { power: 2.0 }, Measure::Gradient { scale: 0.3, power: 1.5 }];
                let ahead = measures.map(|measure| predict(level, &rules, measure, &gradient, w, [&a[..], &b[..]]));
                let weights = WeightsMut { exact: &mut *w, rounded: Some(&mut copy) };
                let sums = update(level, &rules, &gradient, weights, [a, b]);
                assert!(copy.iter().zip(&*w).all(|(copy, w)| copy.to_bits() == bf16::from_f32(*w).to_bits()));
                for group in [0, 1] {
                    assert_eq!(with[group].gradient_sq.to_bits(), without[group].gradient_sq.to_bits());
                    assert!(close(ahead[0][group], sums[group]), "{ahead:?} {sums:?}");
                }
                let sums: Vec<u64> = sums.iter().chain(ahead.iter().flatten()).map(|x| x.to_bits()).collect();
                (all.map(|part| part.iter().map(|x| x.to_bits()).collect::<Vec<_>>()), sums, with)
            };
            let portable = run(Level::Portable);
            for level in Level::available() {
                assert!(run(level) == portable, "{level:?}, {len} elements");
            }
        }
    }

    #[test]
    fn the_passes_do_what_a_plain_loop_does_and_leave_alone_what_no_range_covers() {
        let len = CHUNK + 1000;
        let (gradient, weight, first) = (random(len, 1), random(len, 2), random(len, 3));
        let second: Vec<f32> = random(len, 4).iter().map(|x| x * x).collect();
        let ranges = [5..40, 40..41, 100..CHUNK + 177];
        let sums = reduce(Level::best(), &ranges, &gradient, Some(&first));
        let rules = ranges.clone().map(|range| (range.clone(), Mixed(range.start as f32 * 1e-3)));
        let mut got = [weight.clone(), first.clone(), second.clone()];
        let [w, a, b] = &mut got;
        let squares = update(Level::best(), &rules, &gradient, WeightsMut { exact: w, rounded: None }, [a, b]);
        let mut expected = [weight.clone(), first.clone(), second.clone()];
        for (place, (range, rule)) in rules.iter().enumerate() {
            let (mut gg, mut vg, mut vv) = (0.0, 0.0, 0.0);
            for i in range.clone() {
                gg += f64::from(gradient[i]).powi(2);
                vg += f64::from(gradient[i]) * f64::from(first[i]);
                let (new, [v, m]) = rule.apply(gradient[i], weight[i], [first[i], second[i]]);
                (expected[0][i], expected[1][i], expected[2][i]) = (new, v, m);
                vv += f64::from(v).powi(2);
            }
            let sums = sums[place];
            assert!(close(sums.gradient_sq, gg) && close(sums.velocity_gradient, vg) && close(squares[place], vv));
        }
        assert!(got == expected);
    }
}
