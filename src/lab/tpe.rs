//! A tree-structured Parzen estimator (Bergstra et al., 2011): where to look next, from what was seen.
//!
//! Seen points are split into the best tenth and the rest; each part gets a density (a mixture of truncated normal
//! kernels and a uniform one, a product over the dimensions), and among points drawn from the density of the good ones
//! the one with the greatest ratio of good to bad is taken. Everything happens in the unit cube and is a function of the
//! seed, the number of the trial, and what was seen.

use crate::random::{Stream, generator, normal_pair, uniform};
use rand_chacha::ChaCha8Rng;

/// A point in the unit cube and what it gave; `None`: it failed, which is worse than anything.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub place: Vec<f64>,
    pub objective: Option<f64>,
}

/// Part of the points that count as good.
const GOOD: f64 = 0.1;
/// Points drawn from the good density, of which one is taken.
const CANDIDATES: usize = 32;

/// The next point: while fewer than `startup` trials are made, one of a low-discrepancy sequence. `pending` are points
/// whose results are not there yet: they count as bad, so that workers side by side look elsewhere.
pub fn suggest(
    dimensions: usize,
    trial: usize,
    startup: usize,
    seen: &[Seen],
    pending: &[Vec<f64>],
    seed: u64,
) -> Vec<f64> {
    let mut generator = generator(seed, Stream::Search);
    if trial < startup || seen.iter().all(|seen| seen.objective.is_none()) {
        let shift: Vec<f64> = (0..dimensions).map(|_| f64::from(uniform(&mut generator))).collect();
        return low_discrepancy(trial, &shift);
    }
    generator.set_word_pos((trial as u128 + 1) << 32);
    let mut order: Vec<&Seen> = seen.iter().collect();
    let rank = |seen: &Seen| seen.objective.unwrap_or(f64::INFINITY);
    order.sort_by(|a, b| rank(a).total_cmp(&rank(b)));
    let finished = order.iter().filter(|seen| seen.objective.is_some()).count();
    let good = ((GOOD * order.len() as f64).ceil() as usize).clamp(1, finished);
    let (best, rest) = order.split_at(good);
    let best: Vec<&[f64]> = best.iter().map(|seen| &seen.place[..]).collect();
    let rest: Vec<&[f64]> =
        rest.iter().map(|seen| &seen.place[..]).chain(pending.iter().map(|place| &place[..])).collect();
    let (best, rest) = (Parzen::new(dimensions, &best), Parzen::new(dimensions, &rest));
    let mut taken = (f64::NEG_INFINITY, vec![0.5; dimensions]);
    for _ in 0..CANDIDATES {
        let place = best.draw(&mut generator);
        let ratio = best.log_density(&place) - rest.log_density(&place);
        if ratio > taken.0 {
            taken = (ratio, place);
        }
    }
    taken.1
}

/// Point `index` of an additive recurrence with the generalised golden ratio (Roberts, 2018), moved by `shift`.
fn low_discrepancy(index: usize, shift: &[f64]) -> Vec<f64> {
    let dimensions = shift.len() as i32;
    // The positive root of x^(d+1) = x + 1.
    let mut root = 2.0f64;
    for _ in 0..64 {
        root = (1.0 + root).powf(1.0 / f64::from(dimensions + 1));
    }
    let step = |axis: usize| root.powi(-(axis as i32 + 1));
    shift.iter().enumerate().map(|(axis, shift)| (shift + index as f64 * step(axis)).fract()).collect()
}

/// A density over the unit cube.
struct Parzen<'a> {
    points: &'a [&'a [f64]],
    /// Width of the kernels along each axis.
    widths: Vec<f64>,
}

impl<'a> Parzen<'a> {
    fn new(dimensions: usize, points: &'a [&'a [f64]]) -> Self {
        let count = points.len().max(1) as f64;
        let width = |axis: usize| {
            let mean = points.iter().map(|point| point[axis]).sum::<f64>() / count;
            let variance = points.iter().map(|point| (point[axis] - mean).powi(2)).sum::<f64>() / count;
            // Scott's rule, narrowed (good points lie around one place), and held off the extremes: few points must not
            // freeze an axis. Of the parts and factors tried on a bowl with 48 trials these found the least.
            let scott = 0.7 * variance.sqrt() * count.powf(-1.0 / (dimensions as f64 + 4.0));
            scott.clamp(0.5 / (count + 4.0), 0.5)
        };
        Self { points, widths: (0..dimensions).map(width).collect() }
    }

    fn draw(&self, generator: &mut ChaCha8Rng) -> Vec<f64> {
        let count = self.points.len();
        // One more kernel, the uniform one.
        let chosen = ((f64::from(uniform(generator)) * (count + 1) as f64) as usize).min(count);
        let axis = |(axis, width): (usize, &f64)| {
            let Some(point) = self.points.get(chosen) else { return f64::from(uniform(generator)) };
            // Drawn again while outside: at least a sixth of a kernel lies inside.
            for _ in 0..100 {
                let value = point[axis] + width * normal_pair(generator).0;
                if (0.0..=1.0).contains(&value) {
                    return value;
                }
            }
            point[axis]
        };
        self.widths.iter().enumerate().map(axis).collect()
    }

    fn log_density(&self, place: &[f64]) -> f64 {
        let kernel = |point: &&[f64]| {
            let axes = self.widths.iter().enumerate().map(|(axis, width)| {
                let z = (place[axis] - point[axis]) / width;
                let inside = normal_cdf((1.0 - point[axis]) / width) - normal_cdf(-point[axis] / width);
                (-0.5 * z * z).exp() / (width * (2.0 * std::f64::consts::PI).sqrt() * inside)
            });
            axes.product::<f64>()
        };
        let sum: f64 = self.points.iter().map(kernel).sum();
        ((1.0 + sum) / (self.points.len() + 1) as f64).ln()
    }
}

fn normal_cdf(x: f64) -> f64 {
    0.5 * statrs::function::erf::erfc(-x / std::f64::consts::SQRT_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches the minimum of `f` over the unit cube.
    fn search(dimensions: usize, trials: usize, seed: u64, f: impl Fn(&[f64]) -> Option<f64>) -> f64 {
        let mut seen: Vec<Seen> = Vec::new();
        for trial in 0..trials {
            let place = suggest(dimensions, trial, 8, &seen, &[], seed);
            assert!(place.iter().all(|x| (0.0..=1.0).contains(x)));
            let objective = f(&place);
            seen.push(Seen { place, objective });
        }
        seen.iter().filter_map(|seen| seen.objective).fold(f64::INFINITY, f64::min)
    }

    fn bowl(place: &[f64]) -> Option<f64> {
        Some((place[0] - 0.31).powi(2) + 0.3 * (place[1] - 0.74).powi(2))
    }

    #[test]
    fn it_finds_a_minimum_better_than_random_points_do() {
        let mut sums = [0.0; 2];
        for seed in 0..12 {
            sums[0] += search(2, 48, seed, bowl);
            let mut generator = generator(seed, Stream::Init);
            let random = (0..48).map(|_| [uniform(&mut generator), uniform(&mut generator)].map(f64::from));
            sums[1] += random.filter_map(|place| bowl(&place)).fold(f64::INFINITY, f64::min);
        }
        assert!(sums[0] < 0.5 * sums[1], "{sums:?}");
    }

    #[test]
    fn failed_points_are_avoided_and_suggestions_repeat() {
        let failing = |place: &[f64]| if place[0] > 0.5 { None } else { Some((place[0] - 0.45).abs()) };
        assert!(search(1, 30, 5, failing) < 0.02);
        let seen: Vec<Seen> =
            (0..12).map(|i| Seen { place: vec![f64::from(i) / 12.0], objective: Some(f64::from(i)) }).collect();
        let next = |pending: &[Vec<f64>]| suggest(1, 12, 4, &seen, pending, 3);
        assert_eq!(next(&[]), next(&[]));
        assert_ne!(next(&[]), suggest(1, 13, 4, &seen, &[], 3));
        // Nothing but failures: go on covering the space.
        let failures = vec![Seen { place: vec![0.5], objective: None }; 9];
        assert!(suggest(1, 9, 4, &failures, &[], 3)[0] <= 1.0);
    }

    #[test]
    fn the_starting_points_cover_the_space() {
        let points: Vec<Vec<f64>> = (0..32).map(|trial| suggest(2, trial, 32, &[], &[], 9)).collect();
        for cell in 0..16 {
            let (x, y) = (f64::from(cell % 4) / 4.0, f64::from(cell / 4) / 4.0);
            let inside = |p: &&Vec<f64>| (x..x + 0.25).contains(&p[0]) && (y..y + 0.25).contains(&p[1]);
            assert!((1..=4).contains(&points.iter().filter(inside).count()), "cell {cell}");
        }
    }
}
