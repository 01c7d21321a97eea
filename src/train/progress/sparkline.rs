//! Small curves of one line: the history of a number over a whole run, in bounded memory.

/// The means of equal stretches of what was pushed.
#[derive(Clone, Debug)]
pub struct History {
    means: Vec<f64>,
    /// Values in each of `means`.
    stretch: usize,
    sum: f64,
    count: usize,
}

impl Default for History {
    fn default() -> Self {
        Self { means: Vec::new(), stretch: 1, sum: 0.0, count: 0 }
    }
}

/// What the top and the bottom of a curve stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// The largest and the smallest value shown.
    Own,
    /// 1 and 0.
    Share,
}

/// Stretches kept; at twice as many, pairs are joined.
const KEPT: usize = 256;

impl History {
    pub fn push(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
        if self.count < self.stretch {
            return;
        }
        self.means.push(self.sum / self.count as f64);
        (self.sum, self.count) = (0.0, 0);
        if self.means.len() == 2 * KEPT {
            self.means = self.means.chunks(2).map(|pair| pair.iter().sum::<f64>() / pair.len() as f64).collect();
            self.stretch *= 2;
        }
    }

    /// The curve in at most `columns` characters, oldest first.
    pub fn draw(&self, columns: usize, scale: Scale, marks: &[char]) -> String {
        // A run's first steps would flatten all the rest.
        let skipped = if scale == Scale::Own && self.means.len() >= 20 { self.means.len() / 10 } else { 0 };
        let values = &self.means[skipped..];
        let columns = columns.min(values.len());
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let column = |index: usize| &values[index * values.len() / columns..(index + 1) * values.len() / columns];
        let heights: Vec<f64> = (0..columns).map(|index| mean(column(index))).collect();
        let (low, high) = match scale {
            Scale::Own => heights.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (v.min(l), v.max(h))),
            Scale::Share => (0.0, 1.0),
        };
        let mark = |height: f64| {
            let share = if high > low { (height - low) / (high - low) } else { 0.5 };
            marks[((share * marks.len() as f64) as usize).min(marks.len() - 1)]
        };
        heights.into_iter().map(mark).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: [char; 4] = ['0', '1', '2', '3'];

    #[test]
    fn a_curve_shows_the_whole_run_whatever_its_length() {
        for steps in [40, 5_000, 100_000] {
            let mut history = History::default();
            (0..steps).for_each(|step| history.push(f64::from(step) / f64::from(steps)));
            assert!(history.means.len() < 2 * KEPT);
            assert_eq!(history.draw(8, Scale::Share, &MARKS), "00112233", "{steps} steps");
            assert_eq!(history.draw(8, Scale::Own, &MARKS).len(), 8);
        }
    }

    #[test]
    fn a_curve_of_nothing_or_of_equal_values_can_be_drawn() {
        let mut history = History::default();
        assert_eq!(history.draw(8, Scale::Own, &MARKS), "");
        (0..3).for_each(|_| history.push(2.0));
        assert_eq!(history.draw(8, Scale::Own, &MARKS), "222");
        assert_eq!(history.draw(8, Scale::Share, &MARKS), "333");
        assert_eq!(history.draw(0, Scale::Own, &MARKS), "");
    }
}
