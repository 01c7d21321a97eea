//! Fewer rows, with every spike: the extremes of each column in each stretch of a run stay.

use super::rows::Rows;

/// Columns that only grow: they have no spikes.
const GROWING: &[&str] = &["step", "tokens", "elapsed_s", "time"];

/// About `budget` rows, or all of them. Kept are the first and the last row, in each stretch of rows the smallest and the
/// largest value of each column, and all values of columns that few rows have (the validation loss).
pub fn thin(rows: &Rows, budget: usize) -> Rows {
    let count = rows.len();
    if count <= budget {
        return rows.clone();
    }
    let columns: Vec<&[f64]> =
        rows.columns().filter(|(name, _)| !GROWING.contains(name)).map(|(_, values)| values).collect();
    let mut kept = vec![false; count];
    kept[0] = true;
    kept[count - 1] = true;
    let stretches = (budget / (2 * columns.len()).max(1)).max(1);
    for values in columns {
        let there = values.iter().filter(|value| !value.is_nan()).count();
        if there <= budget / 10 {
            values.iter().zip(&mut kept).for_each(|(value, kept)| *kept |= !value.is_nan());
            continue;
        }
        for stretch in 0..stretches {
            let range = stretch * count / stretches..(stretch + 1) * count / stretches;
            let finite = range.filter(|row| !values[*row].is_nan());
            let by_value = |one: &usize, other: &usize| values[*one].total_cmp(&values[*other]);
            let (low, high) = (finite.clone().min_by(by_value), finite.max_by(by_value));
            [low, high].into_iter().flatten().for_each(|row| kept[row] = true);
        }
    }
    let kept: Vec<usize> = kept.iter().enumerate().filter(|(_, kept)| **kept).map(|(row, _)| row).collect();
    rows.select(&kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Result;

    #[test]
    fn a_hundred_thousand_steps_keep_every_spike_and_every_validation() -> Result<()> {
        let mut rows = Rows::default();
        let spikes = [3, 777, 50_000, 99_998];
        for step in 1..=100_000u32 {
            let loss = if spikes.contains(&step) { 99.0 } else { 3.0 + f64::from(step % 7) };
            let gate = if step == 60_001 { 0.001 } else { 0.9 };
            let val = if step % 1000 == 0 { r#","val_loss":2.5"# } else { "" };
            rows.push(&format!(r#"{{"step":{step},"loss":{loss},"gate":{gate}{val}}}"#))?;
        }
        let thin = thin(&rows, 5000);
        assert!(thin.len() <= 5_200, "{}", thin.len());
        let of = |name: &str| thin.column(name).map(<[f64]>::to_vec).unwrap_or_default();
        let (steps, loss, gate) = (of("step"), of("loss"), of("gate"));
        let spiked: Vec<f64> = steps.iter().zip(&loss).filter(|(_, loss)| **loss == 99.0).map(|(s, _)| *s).collect();
        assert_eq!(spiked, [3.0, 777.0, 50_000.0, 99_998.0]);
        assert_eq!(gate.iter().filter(|gate| **gate == 0.001).count(), 1);
        assert_eq!(of("val_loss").iter().filter(|value| !value.is_nan()).count(), 100);
        assert!(steps.is_sorted() && steps.first() == Some(&1.0) && steps.last() == Some(&100_000.0));
        Ok(())
    }
}
