//! The passes over flat f32 buffers on the CPU: reduce, predict, update.
//!
//! A buffer is cut into chunks of a fixed size, every chunk sums in a fixed number of f64 lanes, and the chunks' sums
//! are added in their order. So the bits depend on neither the number of threads nor the instruction set: the inner
//! loops are written once, are compiled for AVX-512, AVX2 and the portable baseline, and use no fused multiply-add
//! (a product of two f32 is exact in f64, so the sums would not change by it).

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
        rule: R, gradient: &[f32], weight: &mut [f32], state: [&mut [f32]; N],
    ) -> f64 = update_body;
}

/// Lanes to one number, in a fixed tree.
#[inline(always)]
fn total(mut lanes: [f64; LANES]) -> f64 {
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

#[inline(always)]
fn reduce_body(gradient: &[f32], velocity: Option<&[f32]>) -> Sums {
    let (blocks, tail) = gradient.as_chunks::<LANES>();
    let mut squares = [0.0f64; LANES];
    let mut add = |block: &[f32; LANES]| {
        for lane in 0..LANES {
            squares[lane] += f64::from(block[lane]) * f64::from(block[lane]);
        }
    };
    let Some(velocity) = velocity else {
        blocks.iter().for_each(&mut add);
        add(&padded(tail));
        return Sums { gradient_sq: total(squares), velocity_gradient: 0.0 };
    };
    let (velocity_blocks, velocity_tail) = velocity.as_chunks::<LANES>();
    let mut products = [0.0f64; LANES];
    let mut add_both = |block: &[f32; LANES], velocity: &[f32; LANES]| {
        add(block);
        for lane in 0..LANES {
            products[lane] += f64::from(block[lane]) * f64::from(velocity[lane]);
        }
    };
    blocks.iter().zip(velocity_blocks).for_each(|(block, velocity)| add_both(block, velocity));
    add_both(&padded(tail), &padded(velocity_tail));
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
    weight: &mut [f32],
    state: [&mut [f32]; N],
) -> f64 {
    let (gradient_blocks, gradient_tail) = gradient.as_chunks::<LANES>();
    let (weight_blocks, weight_tail) = weight.as_chunks_mut::<LANES>();
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
        for lane in 0..LANES {
            sums[lane] += f64::from(after[0][lane]) * f64::from(after[0][lane]);
        }
        *weight = new_weight;
        for k in 0..N {
            state_blocks[k][index] = after[k];
        }
    }
    let rest = gradient_tail.len();
    let before: [[f32; LANES]; N] = array::from_fn(|k| padded(state_tails[k]));
    let (new_weight, after) = apply_block(rule, &padded(gradient_tail), &padded(weight_tail), &before);
    weight_tail.copy_from_slice(&new_weight[..rest]);
    for (tail, block) in state_tails.iter_mut().zip(&after) {
        tail.copy_from_slice(&block[..rest]);
    }
    for lane in 0..rest {
        sums[lane] += f64::from(after[0][lane]) * f64::from(after[0][lane]);
    }
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

/// Applies to every range its rule and gives ||new velocity||^2 of every range. The ranges ascend without overlap;
/// what lies between them stays as it is.
pub(super) fn update<const N: usize, R: Rule<N>>(
    level: Level,
    ranges: &[(Range<usize>, R)],
    gradient: &[f32],
    weight: &mut [f32],
    state: [&mut [f32]; N],
) -> Vec<f64> {
    struct Work<'a, const N: usize> {
        place: usize,
        gradient: &'a [f32],
        weight: &'a mut [f32],
        state: [&'a mut [f32]; N],
    }
    /// Takes `range` off the front of `rest`, of which `from` elements are gone already.
    fn take<'a>(rest: &mut &'a mut [f32], from: usize, range: &Range<usize>) -> &'a mut [f32] {
        let (taken, remaining) = std::mem::take(rest).split_at_mut(range.end - from);
        *rest = remaining;
        &mut taken[range.start - from..]
    }
    let places: Vec<Range<usize>> = ranges.iter().map(|(range, _)| range.clone()).collect();
    let (mut weight, mut state, mut from) = (weight, state, 0);
    let mut work = Vec::new();
    for (place, range) in chunks(&places) {
        work.push(Work {
            place,
            gradient: &gradient[range.clone()],
            weight: take(&mut weight, from, &range),
            state: state.each_mut().map(|part| take(part, from, &range)),
        });
        from = range.end;
    }
    let part =
        |work: Work<N>| (work.place, update_chunk(level, ranges[work.place].1, work.gradient, work.weight, work.state));
    let parts: Vec<_> = work.into_par_iter().map(part).collect();
    by_range(ranges.len(), &parts)
}
