//! The numbers of a run as columns: one row a step, from metrics.jsonl and telemetry.jsonl.

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Columns of equal length, the first of them `step`; NaN stands for no value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    columns: Vec<(String, Vec<f64>)>,
}

fn parse(line: &str) -> Result<(f64, Map<String, Value>)> {
    let fields: Map<String, Value> = serde_json::from_str(line)?;
    let step = fields.get("step").and_then(Value::as_f64).context("it has no number `step`")?;
    Ok((step, fields))
}

impl Rows {
    /// Reads a run's whole lines; a run that has not begun has no rows.
    pub fn read(run: &Path) -> Result<Self> {
        // The telemetry first: a trainer writes a step's metrics before its telemetry.
        let telemetry = read_or_empty(&run.join("telemetry.jsonl"))?;
        let metrics = read_or_empty(&run.join("metrics.jsonl"))?;
        let mut rows = Self::default();
        let place = |name: &str, number: usize| format!("{}:{}: not a record", run.join(name).display(), number + 1);
        for (number, line) in whole_lines(&metrics).enumerate() {
            rows.push(line).with_context(|| place("metrics.jsonl", number))?;
        }
        for (number, line) in whole_lines(&telemetry).enumerate() {
            rows.complete(line).with_context(|| place("telemetry.jsonl", number))?;
        }
        Ok(rows)
    }

    pub fn len(&self) -> usize {
        self.columns.first().map_or(0, |(_, values)| values.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn columns(&self) -> impl Iterator<Item = (&str, &[f64])> {
        self.columns.iter().map(|(name, values)| (name.as_str(), values.as_slice()))
    }

    pub fn column(&self, name: &str) -> Option<&[f64]> {
        self.columns().find(|(own, _)| *own == name).map(|(_, values)| values)
    }

    /// The last value of a column.
    pub fn last(&self, name: &str) -> Option<f64> {
        self.column(name)?.iter().rev().copied().find(|value| !value.is_nan())
    }

    /// Adds a line of metrics.jsonl. Rows of its step and later ones give way to it.
    pub fn push(&mut self, line: &str) -> Result<()> {
        let (step, fields) = parse(line)?;
        self.cut(step);
        let row = self.len();
        self.set(row, "step", step);
        for (name, value) in &fields {
            if let Some(number) = value.as_f64() {
                self.set(row, name, number);
            }
        }
        for (_, values) in &mut self.columns {
            values.resize(row + 1, f64::NAN);
        }
        Ok(())
    }

    /// Adds a line of telemetry.jsonl to the row of its step, if there is one.
    pub fn complete(&mut self, line: &str) -> Result<()> {
        let (step, fields) = parse(line)?;
        let steps = self.columns.first().map_or(&[][..], |(_, values)| values);
        let row = steps.partition_point(|own| *own < step);
        if steps.get(row) != Some(&step) {
            return Ok(());
        }
        for (name, value) in &fields {
            if let Some(number) = value.as_f64() {
                self.set(row, name, number);
            }
        }
        Ok(())
    }

    fn set(&mut self, row: usize, name: &str, number: f64) {
        let index = self.columns.iter().position(|(own, _)| own == name);
        let index = index.unwrap_or_else(|| {
            let rows = self.len();
            self.columns.push((name.to_owned(), vec![f64::NAN; rows]));
            self.columns.len() - 1
        });
        let values = &mut self.columns[index].1;
        if values.len() <= row {
            values.resize(row + 1, f64::NAN);
        }
        values[row] = number;
    }

    /// Drops the rows of `step` and of later steps.
    fn cut(&mut self, step: f64) {
        let steps = self.columns.first().map_or(&[][..], |(_, values)| values);
        if steps.last().is_some_and(|last| *last >= step) {
            let kept = steps.partition_point(|own| *own < step);
            self.columns.iter_mut().for_each(|(_, values)| values.truncate(kept));
        }
    }

    /// Takes the rows that are complete: all but a last one whose telemetry is still to come.
    pub fn take_complete(&mut self, telemetry: Telemetry) -> Self {
        let last_is_complete = self.column("time").and_then(<[f64]>::last).is_some_and(|time| !time.is_nan());
        if self.is_empty() || telemetry == Telemetry::None || last_is_complete {
            return std::mem::take(self);
        }
        let rows = self.len();
        let last = self.columns.iter_mut().map(|(name, values)| (name.clone(), values.split_off(rows - 1)));
        let last = Self { columns: last.collect() };
        std::mem::replace(self, last)
    }

    /// The rows `kept`, in order.
    pub fn select(&self, kept: &[usize]) -> Self {
        let pick = |values: &Vec<f64>| kept.iter().map(|row| values[*row]).collect();
        Self { columns: self.columns.iter().map(|(name, values)| (name.clone(), pick(values))).collect() }
    }

    /// Gives every row its training time: where the telemetry has none, the steps' own times add up.
    pub fn with_elapsed(mut self) -> Self {
        let Some(step_ms) = self.column("step_ms").map(<[f64]>::to_vec) else { return self };
        let mut elapsed = 0.0;
        for (row, step_ms) in step_ms.iter().enumerate() {
            let known = self.column("elapsed_s").map_or(f64::NAN, |values| values[row]);
            elapsed = if known.is_nan() { elapsed + step_ms / 1e3 } else { known };
            self.set(row, "elapsed_s", elapsed);
        }
        self
    }
}

/// Whether a run writes telemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Telemetry {
    None,
    Written,
}

fn read_or_empty(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The lines that have their end: a trainer may be writing the last one.
pub fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    text.rfind('\n').map_or("", |end| &text[..end]).lines()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_join_both_files_and_follow_a_cut() -> Result<()> {
        let mut rows = Rows::default();
        rows.push(r#"{"step":1,"loss":3.5}"#)?;
        rows.push(r#"{"step":2,"loss":3.25,"val_loss":3.0}"#)?;
        rows.push(r#"{"step":3,"loss":3.0}"#)?;
        rows.complete(r#"{"step":1,"time":10.0}"#)?;
        rows.complete(r#"{"step":9,"time":90.0}"#)?;
        let val = rows.column("val_loss").context("a column")?;
        assert!(val[0].is_nan() && val[1] == 3.0 && val[2].is_nan());
        rows.push(r#"{"step":2,"loss":3.125}"#)?;
        assert_eq!(rows.column("loss"), Some(&[3.5, 3.125][..]));
        assert!(rows.column("val_loss").is_some_and(|values| values.len() == 2 && values[1].is_nan()));
        let complete = rows.take_complete(Telemetry::Written);
        assert_eq!((complete.len(), rows.len()), (1, 1));
        rows.complete(r#"{"step":2,"time":11.0}"#)?;
        assert_eq!(rows.take_complete(Telemetry::Written).column("time"), Some(&[11.0][..]));
        assert!(rows.is_empty() && Rows::default().push("{}").is_err());
        Ok(())
    }

    #[test]
    fn training_time_is_known_without_telemetry() -> Result<()> {
        let mut rows = Rows::default();
        (1..=3).try_for_each(|step| rows.push(&format!(r#"{{"step":{step},"step_ms":500}}"#)))?;
        assert_eq!(rows.with_elapsed().column("elapsed_s"), Some(&[0.5, 1.0, 1.5][..]));
        Ok(())
    }
}
