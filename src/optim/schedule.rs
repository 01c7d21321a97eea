//! Learning-rate schedules: pure functions of the step.

use super::config::{ConfigError, nearest};
use std::f64::consts::PI;

/// The course of the rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Half a cosine from the peak to the floor.
    Cosine,
    /// A straight line from the peak to the floor.
    Linear,
    /// The peak for ever.
    Constant,
    /// Warm-up, stable, decay: the peak until the last `decay_ratio` of the horizon, then a line to the floor.
    Wsd { decay_ratio: f64 },
    /// From the floor up to the peak, exponentially, over the whole horizon: a learning-rate range test.
    RangeTest,
}

/// A schedule with its horizon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    /// Steps in which the rate climbs to the peak; 0 is legal.
    pub warmup_steps: u64,
    /// The floor as a part of the peak.
    pub min_lr_ratio: f64,
    /// The horizon; later steps stay at the floor (a constant schedule: at the peak).
    pub steps: u64,
}

impl Schedule {
    pub const NAMES: [&str; 5] = ["cosine", "linear", "constant", "wsd", "range_test"];

    /// `decay_ratio` belongs to "wsd" alone, where it is 0.2 unless given.
    ///
    /// # Errors
    /// Names the key that is wrong.
    pub fn new(
        name: &str,
        warmup_steps: u64,
        min_lr_ratio: f64,
        steps: u64,
        decay_ratio: Option<f64>,
    ) -> Result<Self, ConfigError> {
        let refuse = |key: &str, message: String| Err(ConfigError { key: Some(key.into()), message });
        let shape = match name {
            "cosine" => Shape::Cosine,
            "linear" => Shape::Linear,
            "constant" => Shape::Constant,
            "wsd" => Shape::Wsd { decay_ratio: decay_ratio.unwrap_or(0.2) },
            "range_test" if min_lr_ratio > 0.0 => Shape::RangeTest,
            "range_test" => {
                return refuse("min_lr_ratio", "a range test begins at min_lr_ratio, which must be above 0".into());
            }
            _ => {
                let hint = nearest(name, Self::NAMES);
                return refuse("name", format!("no schedule is named {name:?}; {hint}"));
            }
        };
        match shape {
            Shape::Wsd { decay_ratio } if !(0.0..=1.0).contains(&decay_ratio) => {
                return refuse("decay_ratio", format!("decay_ratio = {decay_ratio} is not between 0 and 1"));
            }
            Shape::Wsd { .. } => {}
            _ if decay_ratio.is_some() => {
                return refuse("decay_ratio", format!("decay_ratio belongs to the schedule \"wsd\", not to {name:?}"));
            }
            _ => {}
        }
        if !(0.0..=1.0).contains(&min_lr_ratio) {
            return refuse("min_lr_ratio", format!("min_lr_ratio = {min_lr_ratio} is not between 0 and 1"));
        }
        Ok(Self { shape, warmup_steps, min_lr_ratio, steps })
    }

    /// The rate of step number `step`, counted from 0, where the peak is `peak`.
    pub fn lr(&self, peak: f64, step: u64) -> f64 {
        if step < self.warmup_steps {
            return peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let floor = self.min_lr_ratio * peak;
        match self.shape {
            Shape::Constant => peak,
            Shape::Cosine => floor + (peak - floor) * 0.5 * (1.0 + (PI * self.progress(step, self.warmup_steps)).cos()),
            Shape::Linear => peak + (floor - peak) * self.progress(step, self.warmup_steps),
            Shape::RangeTest => {
                let part = step as f64 / self.steps.saturating_sub(1).max(1) as f64;
                floor * (peak / floor).powf(part.min(1.0))
            }
            Shape::Wsd { decay_ratio } => {
                let decay_steps = (decay_ratio * self.steps as f64).round() as u64;
                let start = self.steps.saturating_sub(decay_steps).max(self.warmup_steps);
                peak + (floor - peak) * self.progress(step, start)
            }
        }
    }

    /// The part of the way from `start` to the horizon, in 0..=1.
    fn progress(&self, step: u64, start: u64) -> f64 {
        if step >= self.steps {
            return 1.0;
        }
        step.saturating_sub(start) as f64 / self.steps.saturating_sub(start).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedule(name: &str, warmup_steps: u64, min_lr_ratio: f64, steps: u64) -> Schedule {
        Schedule::new(name, warmup_steps, min_lr_ratio, steps, None).unwrap()
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-15
    }

    #[test]
    fn the_rate_climbs_in_equal_steps_and_the_first_step_is_not_zero() {
        for name in Schedule::NAMES {
            let rates: Vec<f64> = (0..5).map(|step| schedule(name, 5, 0.1, 40).lr(0.003, step)).collect();
            assert!(rates.iter().zip([0.0006, 0.0012, 0.0018, 0.0024, 0.003]).all(|(&a, b)| close(a, b)), "{rates:?}");
        }
    }

    /// A reference run of another trainer (GPT-2, 40 steps, 5 of warm-up, floor 10%): its logged rates.
    #[test]
    fn the_cosine_gives_the_rates_of_a_recorded_run() {
        let cosine = schedule("cosine", 5, 0.1, 40);
        let expected: Vec<f64> = include_str!("../../tests/fixtures/optim/cosine_rates.txt")
            .lines()
            .map(|line| line.parse().unwrap())
            .collect();
        assert_eq!(expected.len(), 40);
        for (step, expected) in expected.iter().enumerate() {
            assert!((cosine.lr(0.003, step as u64) - expected).abs() < 1e-15, "step {step}");
        }
    }

    #[test]
    fn every_schedule_starts_at_the_peak_without_warm_up_and_ends_at_its_floor() {
        for (name, end) in [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0), ("wsd", 0.1)] {
            let schedule = schedule(name, 0, 0.1, 100);
            assert!(close(schedule.lr(1.0, 0), 1.0), "{name}");
            for step in [100, 101, 1_000_000] {
                assert!(close(schedule.lr(1.0, step), end), "{name} {step}");
            }
        }
        assert!(close(schedule("linear", 10, 0.0, 30).lr(2.0, 20), 1.0));
        assert!(close(schedule("cosine", 10, 0.5, 30).lr(2.0, 20), 1.5));
    }

    #[test]
    fn wsd_holds_the_peak_until_its_last_fifth() {
        let wsd = schedule("wsd", 10, 0.0, 100);
        assert!((10..=80).all(|step| close(wsd.lr(1.0, step), 1.0)));
        assert!(close(wsd.lr(1.0, 90), 0.5));
        let all_decay = Schedule::new("wsd", 10, 0.0, 100, Some(1.0)).unwrap();
        assert!(close(all_decay.lr(1.0, 55), 0.5));
    }

    #[test]
    fn a_range_test_climbs_by_equal_factors_from_the_floor_to_the_peak() {
        let range = schedule("range_test", 0, 1e-4, 5);
        let rates: Vec<f64> = (0..5).map(|step| range.lr(1.0, step)).collect();
        assert!(
            rates.iter().zip([1e-4, 1e-3, 1e-2, 1e-1, 1.0]).all(|(&a, b)| (a / b - 1.0).abs() < 1e-12),
            "{rates:?}"
        );
        assert!(Schedule::new("range_test", 0, 0.0, 5, None).is_err());
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        let message = |name, ratio, decay| Schedule::new(name, 0, ratio, 10, decay).unwrap_err().to_string();
        assert!(message("cosin", 0.1, None).contains("\"cosine\""));
        assert!(message("linear", 1.5, None).contains("min_lr_ratio"));
        assert!(message("linear", f64::NAN, None).contains("min_lr_ratio"));
        assert!(message("linear", 0.1, Some(0.3)).contains("wsd"));
        assert!(message("wsd", 0.1, Some(-0.3)).contains("decay_ratio"));
    }

    proptest! {
        #[test]
        fn a_rate_is_finite_and_within_the_peak_for_any_numbers(
            which in 0usize..4, warmup in 0u64..50, ratio in 0.0..=1.0f64, steps in 0u64..100, step in 0u64..200,
        ) {
            let rate = schedule(Schedule::NAMES[which], warmup, ratio, steps).lr(1.0, step);
            prop_assert!(rate > -1e-15 && rate <= 1.0 + 1e-15, "{rate}");
            prop_assert!(step < warmup || rate >= ratio - 1e-15);
            if step >= warmup && step >= 1 {
                let before = schedule(Schedule::NAMES[which], warmup, ratio, steps).lr(1.0, step.max(warmup + 1) - 1);
                prop_assert!(schedule(Schedule::NAMES[which], warmup, ratio, steps).lr(1.0, step.max(warmup + 1)) <= before + 1e-15);
            }
        }
    }
}
