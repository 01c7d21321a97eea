//! McNemar's test: whether two models that answered the same problems differ in how many they get right.
//!
//! Only the problems that one of them got right and the other wrong count. If neither is better, each of these is a fair
//! coin: up to [`EXACT_UP_TO`] of them the two-sided binomial probability is computed, above that chi-squared with one
//! degree of freedom and the continuity correction, (|b - c| - 1)^2 / (b + c).

/// Most discordant problems for which the probability is exact.
pub const EXACT_UP_TO: u64 = 1000;

/// How two models did on the same problems.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    pub both: u64,
    pub only_first: u64,
    pub only_second: u64,
    pub neither: u64,
}

/// The test's result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct McNemar {
    /// Two-sided.
    pub p_value: f64,
    pub method: Method,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    ExactBinomial,
    ChiSquared,
}

impl Method {
    pub fn word(self) -> &'static str {
        match self {
            Self::ExactBinomial => "exact binomial",
            Self::ChiSquared => "chi-squared with continuity correction",
        }
    }
}

impl Table {
    pub fn add(&mut self, first: bool, second: bool) {
        *match (first, second) {
            (true, true) => &mut self.both,
            (true, false) => &mut self.only_first,
            (false, true) => &mut self.only_second,
            (false, false) => &mut self.neither,
        } += 1;
    }

    pub fn problems(&self) -> u64 {
        self.both + self.only_first + self.only_second + self.neither
    }

    pub fn test(&self) -> McNemar {
        let discordant = self.only_first + self.only_second;
        if discordant <= EXACT_UP_TO {
            let fewer = self.only_first.min(self.only_second);
            // P(X <= fewer) of fair coins; with fewer = discordant = 0 it is 1.
            let tail = statrs::function::beta::checked_beta_reg((discordant - fewer) as f64, (fewer + 1) as f64, 0.5);
            return McNemar { p_value: (2.0 * tail.unwrap_or(1.0)).min(1.0), method: Method::ExactBinomial };
        }
        let difference = self.only_first.abs_diff(self.only_second) as f64;
        let statistic = (difference - 1.0).max(0.0).powi(2) / discordant as f64;
        McNemar { p_value: statrs::function::erf::erfc((statistic / 2.0).sqrt()), method: Method::ChiSquared }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (b, c, p) from statsmodels 0.15: `mcnemar([[5, b], [c, 7]], exact=b + c <= 1000, correction=True).pvalue`.
    #[test]
    fn probabilities_are_those_of_statsmodels() {
        for (only_first, only_second, expected) in [
            (0, 0, 1.0),
            (0, 1, 1.0),
            (3, 3, 1.0),
            (1, 9, 0.021484375),
            (12, 30, 0.007915897334896727),
            (40, 61, 0.046044066929342785),
            (500, 500, 1.0),
            (470, 530, 0.06202319509836343),
            (520, 481, 0.22972593862573237),
            (600, 700, 0.006036981097798615),
            (900, 1100, 8.596018738181874e-06),
            (2000, 2500, 1.0171727038149946e-13),
        ] {
            let table = Table { both: 5, only_first, only_second, neither: 7 };
            let result = table.test();
            let off = (result.p_value / expected - 1.0).abs();
            assert!(off < 1e-8, "{only_first} {only_second}: {} instead of {expected}", result.p_value);
            let mirrored = Table { only_first: only_second, only_second: only_first, ..table };
            assert_eq!(mirrored.test(), result);
        }
    }

    #[test]
    fn problems_are_counted_by_who_got_them_right() {
        let mut table = Table::default();
        [(true, true), (true, false), (true, false), (false, true), (false, false)]
            .into_iter()
            .for_each(|(first, second)| table.add(first, second));
        assert_eq!(table, Table { both: 1, only_first: 2, only_second: 1, neither: 1 });
        assert_eq!(table.problems(), 5);
    }
}
