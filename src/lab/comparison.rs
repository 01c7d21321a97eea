//! What a set of runs says: means over seeds, paired differences from a baseline, and whether the pairs are pairs.

use super::plot::{Chart, Forest, Scale, Series, Stroke};
use super::statistics::{Estimate, Verdict, median, short, three_digits};
use crate::train::Record;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// One run that ended.
#[derive(Clone, Debug)]
pub struct RunResult {
    pub entrant: usize,
    pub seed: u64,
    pub outcome: Outcome,
    pub initial_hash: Option<String>,
    /// The run's settings of which [`is_of_data`] holds; empty where it diverged.
    pub data: BTreeMap<String, String>,
}

/// Whether a config key says what is learned or what the validation loss is taken on: runs that differ in it are no
/// pairs, even where the training batches are the same.
pub fn is_of_data(key: &str) -> bool {
    let of_data = ["data.", "task.", "tokenizer.", "train.sequence_length"].iter().any(|begin| key.starts_with(begin));
    let of_means = ["data.tokenizer_threads", "data.cache_gib"].contains(&key) || key.starts_with("task.sharpness_");
    of_data && !of_means
}

/// How it ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    Finished(Vec<Record>),
    /// The loss or a gradient was not finite.
    Diverged(String),
}

impl RunResult {
    fn records(&self) -> &[Record] {
        match &self.outcome {
            Outcome::Finished(records) => records,
            Outcome::Diverged(_) => &[],
        }
    }

    /// The last validation loss.
    pub fn final_loss(&self) -> Option<f64> {
        self.records().iter().rev().find_map(|record| record.val_loss)
    }

    /// Median milliseconds of a step, the first left out.
    fn step_ms(&self) -> Option<f64> {
        let times: Vec<f64> = self.records().iter().skip(1).map(|record| record.step_ms).collect();
        median(&times)
    }
}

/// Everything about one entrant.
#[derive(Clone, Debug)]
pub struct Row {
    pub label: String,
    /// Mean of the last validation losses of the seeds that finished.
    pub loss: Option<Estimate>,
    /// Paired difference from the baseline over the seeds that both finished.
    pub difference: Option<Estimate>,
    pub accuracy: Option<Estimate>,
    pub distance: Option<Estimate>,
    pub seconds_a_step: Option<f64>,
    /// Against AdamW's, where it is among the entrants.
    pub relative_time: Option<f64>,
    pub finished: usize,
    pub diverged: usize,
}

/// The comparison of all entrants.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub labels: Vec<String>,
    pub baseline: usize,
    pub seeds: Vec<u64>,
    pub rows: Vec<Row>,
    /// Seeds whose runs did not begin from the same weights or did not see the same batches: where, in words.
    pub unpaired: Vec<String>,
    results: Vec<RunResult>,
}

impl Comparison {
    pub fn new(labels: Vec<String>, baseline: usize, seeds: Vec<u64>, results: Vec<RunResult>) -> Self {
        let find = |entrant: usize, seed: u64| results.iter().find(|r| r.entrant == entrant && r.seed == seed);
        let adamw = labels.iter().position(|label| label == "adamw");
        let time = |entrant: usize| {
            let times: Vec<f64> =
                results.iter().filter(|r| r.entrant == entrant).filter_map(RunResult::step_ms).collect();
            median(&times).map(|ms| ms / 1e3)
        };
        let row = |(entrant, label): (usize, &String)| {
            let own: Vec<&RunResult> = results.iter().filter(|r| r.entrant == entrant).collect();
            let values = |value: &dyn Fn(&Record) -> Option<f64>| {
                let last = own.iter().filter_map(|r| r.records().iter().rev().find_map(value));
                Estimate::of(&last.collect::<Vec<_>>())
            };
            let pairs: Vec<(f64, f64)> = seeds
                .iter()
                .filter_map(|&seed| find(entrant, seed)?.final_loss().zip(find(baseline, seed)?.final_loss()))
                .collect();
            let (mine, theirs): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            let seconds_a_step = time(entrant);
            Row {
                label: label.clone(),
                loss: values(&|record| record.val_loss),
                difference: if entrant == baseline { None } else { Estimate::paired(&mine, &theirs) },
                accuracy: values(&|record| record.val_accuracy),
                distance: values(&|record| record.val_distance),
                seconds_a_step,
                relative_time: seconds_a_step.zip(adamw.and_then(time)).map(|(mine, adamw)| mine / adamw),
                finished: own.iter().filter(|r| matches!(r.outcome, Outcome::Finished(_))).count(),
                diverged: own.iter().filter(|r| matches!(r.outcome, Outcome::Diverged(_))).count(),
            }
        };
        let rows = labels.iter().enumerate().map(row).collect();
        let unpaired = unpaired(&labels, &seeds, &results);
        Self { labels, baseline, seeds, rows, unpaired, results }
    }

    /// The table as Markdown.
    pub fn table(&self) -> String {
        let has = |value: &dyn Fn(&Row) -> Option<Estimate>| self.rows.iter().any(|row| value(row).is_some());
        let (accuracy, distance) = (has(&|row| row.accuracy), has(&|row| row.distance));
        let baseline = escaped(&self.labels[self.baseline]);
        let pairs = if self.unpaired.is_empty() { "paired" } else { "no pairs" };
        let mut head =
            vec!["optimizer".to_owned(), "val loss".into(), format!("minus {baseline} ({pairs})"), "verdict".into()];
        head.extend(accuracy.then(|| "accuracy".into()));
        head.extend(distance.then(|| "L1 distance".into()));
        head.extend(["s a step".to_owned(), "against AdamW".into(), "runs".into()]);
        let mut lines = vec![format!("| {} |", head.join(" | ")), format!("|{}", "---|".repeat(head.len()))];
        for row in &self.rows {
            let shown = |estimate: Option<Estimate>| estimate.map_or("-".to_owned(), |estimate| show(&estimate));
            let signed = row
                .difference
                .map_or("-".to_owned(), |d| format!("{}{}", if d.mean >= 0.0 { "+" } else { "" }, show(&d)));
            let mut cells = vec![escaped(&row.label), shown(row.loss), signed, self.verdict(row)];
            cells.extend(accuracy.then(|| shown(row.accuracy)));
            cells.extend(distance.then(|| shown(row.distance)));
            cells.push(row.seconds_a_step.map_or("-".into(), three_digits));
            cells.push(row.relative_time.map_or("-".into(), |ratio| format!("{ratio:.2}x")));
            let diverged = if row.diverged > 0 { format!(", {} diverged", row.diverged) } else { String::new() };
            cells.push(format!("{}{diverged}", row.finished));
            lines.push(format!("| {} |", cells.join(" | ")));
        }
        lines.join("\n")
    }

    /// What a row's difference says, in words. Where runs diverged, the others alone say nothing about who is better:
    /// they are the lucky ones.
    fn verdict(&self, row: &Row) -> String {
        let baseline = &self.rows[self.baseline];
        let survivors = |row: &Row| format!("{} of {} diverged", row.diverged, row.diverged + row.finished);
        match row.difference.map(|difference| difference.verdict()) {
            _ if row.diverged > 0 && row.finished == 0 => "diverges".into(),
            _ if row.diverged > 0 => survivors(row),
            None if row.label == baseline.label => "baseline".into(),
            _ if baseline.diverged > 0 => format!("{}: {}", escaped(&baseline.label), survivors(baseline)),
            Some(Verdict::Below) => "better".into(),
            Some(Verdict::Above) => "worse".into(),
            Some(Verdict::Undecided) => "no difference shown".into(),
            None => "-".into(),
        }
    }

    pub fn json(&self) -> Value {
        let estimate = |estimate: Option<Estimate>| {
            estimate.map(|e| json!({"mean": e.mean, "half_width_95": e.half_width, "n": e.count}))
        };
        let rows: Vec<Value> = self
            .rows
            .iter()
            .enumerate()
            .map(|(entrant, row)| {
                let own = self.results.iter().filter(|r| r.entrant == entrant);
                let runs: Vec<Value> = own
                    .map(|r| {
                        let error = match &r.outcome {
                            Outcome::Diverged(error) => Some(error.as_str()),
                            Outcome::Finished(_) => None,
                        };
                        json!({"seed": r.seed, "val_loss": r.final_loss(), "initial_weights_sha256": r.initial_hash,
                               "error": error})
                    })
                    .collect();
                json!({"optimizer": row.label, "val_loss": estimate(row.loss), "difference": estimate(row.difference),
                       "accuracy": estimate(row.accuracy), "distance": estimate(row.distance),
                       "seconds_a_step": row.seconds_a_step, "time_against_adamw": row.relative_time,
                       "finished": row.finished, "diverged": row.diverged, "runs": runs})
            })
            .collect();
        json!({"baseline": self.labels[self.baseline], "seeds": self.seeds, "paired": self.unpaired.is_empty(),
               "unpaired": self.unpaired, "rows": rows})
    }

    /// Mean validation loss over the steps, with intervals over the seeds.
    pub fn curves(&self, title: &str) -> Chart {
        let series = |(entrant, label): (usize, &String)| {
            let own: Vec<&RunResult> = self.results.iter().filter(|r| r.entrant == entrant).collect();
            let mut steps: Vec<u64> = own
                .iter()
                .flat_map(|r| r.records().iter().filter(|record| record.val_loss.is_some()).map(|record| record.step))
                .collect();
            steps.sort_unstable();
            steps.dedup();
            let (mut points, mut band) = (Vec::new(), Vec::new());
            for step in steps {
                let at = |r: &&&RunResult| r.records().iter().find(|record| record.step == step)?.val_loss;
                let values: Vec<f64> = own.iter().filter_map(|r| at(&r)).collect();
                let Some(estimate) = Estimate::of(&values) else { continue };
                points.push((step as f64, estimate.mean));
                if let Some(half) = estimate.half_width {
                    band.push((step as f64, estimate.mean - half, estimate.mean + half));
                }
            }
            Series { label: label.clone(), points, band, stroke: Stroke::Line }
        };
        let series: Vec<Series> =
            self.labels.iter().enumerate().map(series).filter(|series| !series.points.is_empty()).collect();
        // The interval of two or three seeds can be far wider than the curves: it must not set the scale.
        Chart {
            title: title.to_owned(),
            x_label: "step".into(),
            y_label: "validation loss (mean and 95% interval over seeds)".into(),
            x_scale: Scale::Linear,
            y_scale: Scale::Linear,
            series,
        }
    }

    /// The paired differences.
    pub fn differences(&self, title: &str) -> Forest {
        let rows = self.rows.iter().filter_map(|row| Some((row.label.clone(), row.difference?))).collect();
        let x_label = format!("validation loss minus {}'s, paired by seed, 95% interval", self.labels[self.baseline]);
        Forest { title: title.to_owned(), x_label, rows }
    }
}

/// A name as a cell of a Markdown table can have it.
fn escaped(name: &str) -> String {
    name.replace('|', "\\|")
}

fn show(estimate: &Estimate) -> String {
    match estimate.half_width {
        Some(half) => format!("{} ± {}", short(estimate.mean), short(half)),
        None => short(estimate.mean),
    }
}

/// Where runs of one seed differ in their beginning, their batches, their length or their data.
fn unpaired(labels: &[String], seeds: &[u64], results: &[RunResult]) -> Vec<String> {
    let mut found = Vec::new();
    for &seed in seeds {
        let mut runs = results.iter().filter(|r| r.seed == seed && !r.records().is_empty());
        let Some(first) = runs.next() else { continue };
        for other in runs {
            let (a, b) = (&labels[first.entrant], &labels[other.entrant]);
            if first.initial_hash.is_none() || first.initial_hash != other.initial_hash {
                found.push(format!("seed {seed}: {a} and {b} do not begin from the same weights"));
            }
            let [mine, theirs] = [first, other].map(|run| run.records().len());
            if mine != theirs {
                found.push(format!("seed {seed}: {a} is trained for {mine} steps and {b} for {theirs}"));
            }
            found.extend(
                differing(&first.data, &other.data)
                    .map(|(key, ours, others)| format!("seed {seed}: {key} is {ours} for {a} and {others} for {b}")),
            );
            let pairs = first.records().iter().zip(other.records());
            if let Some((record, _)) = pairs.into_iter().find(|(a, b)| a.batch.is_none() || a.batch != b.batch) {
                found.push(format!("seed {seed}: {a} and {b} see different batches at step {}", record.step));
            }
        }
    }
    found
}

/// The keys in which two maps of settings differ, with both values.
pub fn differing<'a>(
    first: &'a BTreeMap<String, String>,
    second: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = (&'a str, &'a str, &'a str)> {
    let value = |map: &'a BTreeMap<String, String>, key: &str| map.get(key).map_or("not set", String::as_str);
    let keys: BTreeSet<&String> = first.keys().chain(second.keys()).collect();
    let all = keys.into_iter().map(move |key| (key.as_str(), value(first, key), value(second, key)));
    all.filter(|(_, first, second)| first != second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(entrant: usize, seed: u64, loss: f64, batch: &str) -> RunResult {
        let record = |step: u64| Record {
            step,
            loss,
            step_ms: 10.0 * (entrant + 1) as f64,
            val_loss: (step == 3).then_some(loss),
            batch: Some(format!("{batch}{step}")),
            ..Record::default()
        };
        let records = (1..=3).map(record).collect();
        let data = BTreeMap::from([("data.validation.tokens".to_owned(), "512".to_owned())]);
        RunResult { entrant, seed, outcome: Outcome::Finished(records), initial_hash: Some("w".into()), data }
    }

    fn diverged(entrant: usize, seed: u64) -> RunResult {
        let outcome = Outcome::Diverged("the loss is NaN".into());
        RunResult { entrant, seed, outcome, initial_hash: Some("w".into()), data: BTreeMap::new() }
    }

    fn labels() -> Vec<String> {
        ["adamw", "vradam", "sgd"].map(str::to_owned).to_vec()
    }

    #[test]
    fn differences_are_paired_by_seed_and_divergence_is_told() {
        let mut results: Vec<RunResult> = (0..3)
            .flat_map(|seed| {
                let noise = seed as f64;
                [run(0, seed, 2.0 + noise, "b"), run(1, seed, 1.9 + noise + 0.001 * noise, "b")]
            })
            .collect();
        results.push(diverged(2, 0));
        let comparison = Comparison::new(labels(), 0, vec![0, 1, 2], results);
        assert!(comparison.unpaired.is_empty(), "{:?}", comparison.unpaired);
        let vradam = &comparison.rows[1];
        let difference = vradam.difference.expect("three pairs");
        assert!((difference.mean + 0.099).abs() < 1e-12 && difference.verdict() == Verdict::Below);
        // The plain interval is far wider than the paired one.
        assert!(vradam.loss.and_then(|loss| loss.half_width) > Some(1.0));
        assert_eq!(vradam.relative_time, Some(2.0));
        let table = comparison.table();
        assert!(
            table.contains("| vradam | 2.9010 ±") && table.contains("better") && table.contains("diverges"),
            "{table}"
        );
        let json = comparison.json();
        assert_eq!(json["paired"], true);
        assert_eq!(json["rows"][2]["runs"][0]["error"], "the loss is NaN");
    }

    #[test]
    fn runs_that_saw_other_batches_are_no_pairs() {
        let results = vec![run(0, 1, 2.0, "b"), run(1, 1, 2.0, "c")];
        let comparison = Comparison::new(labels(), 0, vec![1], results);
        assert!(comparison.unpaired[0].contains("different batches at step 1"), "{:?}", comparison.unpaired);
    }

    #[test]
    fn runs_of_another_length_or_other_validation_data_are_no_pairs() {
        let mut short = run(1, 1, 2.0, "b");
        if let Outcome::Finished(records) = &mut short.outcome {
            records.pop();
        }
        let mut other = run(2, 1, 2.0, "b");
        other.data.insert("data.validation.tokens".into(), "64".into());
        let comparison = Comparison::new(labels(), 0, vec![1], vec![run(0, 1, 2.0, "b"), short, other]);
        let expected = [
            "seed 1: adamw is trained for 3 steps and vradam for 2",
            "seed 1: data.validation.tokens is 512 for adamw and 64 for sgd",
        ];
        assert_eq!(comparison.unpaired, expected);
        assert!(comparison.table().contains("minus adamw (no pairs)"));
        let words = ["data.validation.tokens", "task.loss", "tokenizer.source", "data.cache_gib", "train.eval_every"];
        assert_eq!(words.map(is_of_data), [true, true, true, false, false]);
    }

    #[test]
    fn survivors_alone_are_neither_better_nor_worse() {
        let mut results: Vec<RunResult> = (0..3).map(|seed| run(0, seed, 2.0 + seed as f64, "b")).collect();
        results.extend([run(1, 0, 1.0, "b"), run(1, 1, 2.0, "b"), diverged(1, 2)]);
        results.extend((0..3).map(|seed| run(2, seed, 1.9 + seed as f64, "b")));
        let names = ["a|b", "vradam", "sgd"].map(str::to_owned).to_vec();
        let table = |baseline| Comparison::new(names.clone(), baseline, vec![0, 1, 2], results.clone()).table();
        let first = table(0);
        assert!(first.contains("| 1 of 3 diverged |") && first.contains("| better |"), "{first}");
        assert!(first.contains("minus a\\|b (paired)") && first.contains("\n| a\\|b | "), "{first}");
        let second = table(1);
        assert!(!second.contains("better") && !second.contains("worse"), "{second}");
        assert!(second.contains("| vradam: 1 of 3 diverged |"), "{second}");
    }
}
