//! Means with confidence intervals from few seeds: Student's t, plain and paired.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// A mean with the half-width of its 95% confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub mean: f64,
    /// Half of the 95% interval's width; `None` for fewer than two values.
    pub half_width: Option<f64>,
    pub count: usize,
}

impl Estimate {
    /// The mean of `values`, with Student's interval; `None` where there is no value or one is not finite.
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count as f64;
        let half_width = (count > 1).then(|| {
            let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
            let error = (squares / (count - 1) as f64 / count as f64).sqrt();
            t_quantile(0.975, count - 1) * error
        });
        Some(Self { mean, half_width, count })
    }

    /// The mean of the differences a - b of values that belong together.
    pub fn paired(a: &[f64], b: &[f64]) -> Option<Self> {
        assert_eq!(a.len(), b.len(), "values that belong together come in pairs");
        let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        Self::of(&differences)
    }

    /// Whether the interval leaves out 0, and on which side the mean lies.
    pub fn verdict(&self) -> Verdict {
        match self.half_width {
            Some(half) if self.mean + half < 0.0 => Verdict::Below,
            Some(half) if self.mean - half > 0.0 => Verdict::Above,
            _ => Verdict::Undecided,
        }
    }
}

/// A number with about five significant digits, small and large ones with an exponent.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{value:.4e}"),
        size if size != 0.0 && size < 0.01 => format!("{value:.2e}"),
        _ => format!("{value:.4}"),
    }
}

/// A number with three significant digits.
pub fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let power = value.abs().log10().floor();
    if !(-3.0..6.0).contains(&power) {
        return format!("{value:.2e}");
    }
    let decimals = (2.0 - power).max(0.0) as usize;
    format!("{value:.decimals$}")
}

/// What an interval says about a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Below,
    Above,
    /// 0 lies inside.
    Undecided,
}

/// The value that Student's t with `freedom` degrees of freedom stays below with probability `p`.
fn t_quantile(p: f64, freedom: usize) -> f64 {
    // `new` fails only for a scale or degrees of freedom that are not positive.
    StudentsT::new(0.0, 1.0, freedom as f64).map_or(f64::NAN, |t| t.inverse_cdf(p))
}

/// Middle value of `values` (the mean of the two middle ones); `None` for none.
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The value below which the part `q` of `values` lies, between two values by a straight line; `None` for none.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = q.clamp(0.0, 1.0) * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    Some(sorted[low] + (sorted[high] - sorted[low]) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_use_the_tabulated_quantiles_of_students_t() {
        for (freedom, expected) in [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)] {
            assert!((t_quantile(0.975, freedom) - expected).abs() < 6e-4, "{freedom}");
        }
    }

    /// scipy.stats.ttest_rel and its confidence_interval on the same numbers.
    #[test]
    fn a_paired_difference_has_scipys_interval() -> Result<(), &'static str> {
        let (a, b) = ([1.0, 2.0, 4.0, 3.5], [1.5, 2.25, 4.5, 3.25]);
        let paired = Estimate::paired(&a, &b).ok_or("four pairs")?;
        assert!((paired.mean + 0.25).abs() < 1e-12);
        let half = paired.half_width.ok_or("an interval")?;
        assert!((half - 0.562_582_3).abs() < 1e-6, "{half}");
        assert_eq!(paired.verdict(), Verdict::Undecided);
        assert_eq!(Estimate::of(&[3.0]).map(|e| e.half_width), Some(None));
        assert_eq!(Estimate::of(&[3.0, f64::NAN]), None);
        assert_eq!(Estimate::of(&[1.0, 1.1, 0.9]).map(|e| e.verdict()), Some(Verdict::Above));
        Ok(())
    }

    #[test]
    fn small_numbers_keep_their_digits() {
        assert_eq!([0.0, 5.98765, -0.5, 0.000123456].map(short), ["0.0000", "5.9877", "-0.5000", "1.23e-4"]);
        assert_eq!([999_999.0, -1_234_567.0, 1e70].map(short), ["999999.0000", "-1.2346e6", "1.0000e70"]);
        let numbers = [0.0, 0.000_334, 0.0412, 1.2345, 43.21, 1234.5, 1e7];
        assert_eq!(numbers.map(three_digits), ["0", "3.34e-4", "0.0412", "1.23", "43.2", "1234", "1.00e7"]);
    }

    #[test]
    fn quantiles_lie_between_the_sorted_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.25), Some(1.75));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
