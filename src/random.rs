//! The one seeded generator: every random choice of a run draws from a ChaCha8 stream of the run's seed.
//!
//! A stream is named by its purpose, so that adding draws in one place never moves the draws of another, and a
//! generator's place (`get_word_pos`) is a number that a checkpoint can hold.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

/// What a stream of random numbers is for. The numbers are part of the file formats: never reuse or renumber one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Stream {
    /// Initial weights.
    Init = 1,
    /// The permutation of row groups, files or rows in the training data.
    Shuffle = 2,
    /// Dropout masks.
    Dropout = 3,
    /// Labels sampled from the model (SophiaG).
    SampledLabels = 4,
    /// Text generation.
    Generate = 5,
    /// The quickstart's word problems.
    Corpus = 6,
    /// Low-rank adapters' initial weights.
    Adapter = 7,
    /// Shifts and mirrors of training images.
    Augmentation = 21,
    /// Walks of a GFlowNet.
    Walks = 22,
    /// The start of Lanczos' method.
    Lanczos = 23,
    /// Suggestions of a hyperparameter search.
    Search = 24,
}

/// A generator for `purpose` under the run's `seed`.
pub fn generator(seed: u64, purpose: Stream) -> ChaCha8Rng {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(purpose as u64);
    generator
}

/// Uniform in [0, 1) with 24 bits.
pub fn uniform(generator: &mut ChaCha8Rng) -> f32 {
    (generator.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Uniform in 0..bound without bias (Lemire, "Fast random integer generation in an interval", 2019).
pub fn below(generator: &mut ChaCha8Rng, bound: u64) -> u64 {
    assert!(bound > 0, "below(0)");
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(generator.next_u64()) * u128::from(bound);
        if product as u64 >= threshold {
            return (product >> 64) as u64;
        }
    }
}

/// Standard normal numbers by Box and Muller's method in f64, two a call.
pub fn normal_pair(generator: &mut ChaCha8Rng) -> (f64, f64) {
    const SCALE: f64 = 1.0 / (1u64 << 53) as f64;
    let radius_uniform = ((generator.next_u64() >> 11) as f64 + 0.5) * SCALE;
    let angle_uniform = (generator.next_u64() >> 11) as f64 * SCALE;
    let radius = (-2.0 * radius_uniform.ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * angle_uniform).sin_cos();
    (radius * cos, radius * sin)
}

/// Numbers that one task of [`fill_normal`] draws.
const NORMALS_A_TASK: usize = 1 << 16;

/// Words of the generator's stream that two normal numbers take: two draws of 64 bits.
const WORDS_A_PAIR: u128 = 4;

/// Fills `out` with N(0, standard_deviation). In parallel: each task knows its place in the stream.
pub fn fill_normal(generator: &mut ChaCha8Rng, standard_deviation: f64, out: &mut [f32]) {
    let start = generator.get_word_pos();
    let place = |number: usize| start.wrapping_add(WORDS_A_PAIR * (number as u128).div_ceil(2));
    out.par_chunks_mut(NORMALS_A_TASK).enumerate().for_each_with(generator.clone(), |generator, (task, out)| {
        generator.set_word_pos(place(task * NORMALS_A_TASK));
        for pair in out.chunks_mut(2) {
            let (first, second) = normal_pair(generator);
            pair[0] = (first * standard_deviation) as f32;
            if let Some(slot) = pair.get_mut(1) {
                *slot = (second * standard_deviation) as f32;
            }
        }
    });
    generator.set_word_pos(place(out.len()));
}

/// Shuffles in place (Fisher and Yates).
pub fn shuffle<T>(generator: &mut ChaCha8Rng, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(generator, i as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_one_seed_are_reproducible_and_apart() {
        let draw = |stream| generator(7, stream).next_u64();
        assert_eq!(draw(Stream::Init), draw(Stream::Init));
        assert_ne!(draw(Stream::Init), draw(Stream::Shuffle));
    }

    #[test]
    fn normal_numbers_have_the_moments_asked_for() {
        let mut values = vec![0.0f32; 200_001];
        fill_normal(&mut generator(1, Stream::Init), 0.02, &mut values);
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 2e-4, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 1e-4, "{variance}");
    }

    #[test]
    fn normal_numbers_drawn_in_parallel_are_those_of_one_stream_and_leave_it_where_it_would_be() {
        for len in [1, 2, 7, NORMALS_A_TASK, 3 * NORMALS_A_TASK + 5] {
            let [mut one, mut other] = [(); 2].map(|()| generator(9, Stream::Init));
            // From a place inside a block of the generator.
            assert_eq!(one.next_u32(), other.next_u32());
            let mut values = vec![0.0f32; len];
            fill_normal(&mut one, 1.0, &mut values);
            for pair in values.chunks(2) {
                let (first, second) = normal_pair(&mut other);
                assert_eq!(pair[0], first as f32);
                assert!(pair.len() == 1 || pair[1] == second as f32);
            }
            assert_eq!(one.next_u64(), other.next_u64(), "{len}");
        }
    }

    #[test]
    fn a_shuffle_is_a_permutation_and_below_reaches_every_value() {
        let mut items: Vec<u32> = (0..100).collect();
        let mut generator = generator(3, Stream::Shuffle);
        shuffle(&mut generator, &mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        let mut seen = [false; 5];
        (0..200).for_each(|_| seen[below(&mut generator, 5) as usize] = true);
        assert!(seen.iter().all(|&s| s));
    }
}
