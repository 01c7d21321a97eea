//! Runs as tables: Markdown for a pull request, CSV for a spreadsheet.

use super::RunReport;
use super::describe::{Description, differences};
use super::state::median;

/// Steps at the end of a run whose mean stands for its last loss: one in a hundred.
const LAST_SHARE: usize = 100;

/// The numbers of a run that a table shows.
pub struct Figures {
    pub step: f64,
    /// Mean over the last steps.
    pub loss: f64,
    pub val_loss: f64,
    /// The least validation loss, and its step.
    pub best: Option<(f64, f64)>,
    pub tokens: f64,
    /// Median, the first step left out.
    pub tokens_per_s: f64,
    /// Seconds.
    pub elapsed: f64,
}

impl Figures {
    pub fn of(run: &RunReport) -> Self {
        let rows = run.rows.clone().with_elapsed();
        let last = |name: &str| rows.last(name).unwrap_or(f64::NAN);
        let losses = rows.column("loss").unwrap_or(&[]);
        let losses = &losses[losses.len() - losses.len().div_ceil(LAST_SHARE)..];
        let speeds = rows.column("tokens_per_s").unwrap_or(&[]);
        let pairs = rows.column("val_loss").unwrap_or(&[]).iter().zip(rows.column("step").unwrap_or(&[]));
        let pairs = pairs.filter(|(value, _)| !value.is_nan());
        let best = pairs.min_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(value, step)| (*value, *step));
        Self {
            step: last("step"),
            loss: losses.iter().sum::<f64>() / losses.len() as f64,
            val_loss: last("val_loss"),
            best,
            tokens: last("tokens"),
            tokens_per_s: median(speeds.get(1..).unwrap_or(&[])).unwrap_or(f64::NAN),
            elapsed: last("elapsed_s"),
        }
    }
}

fn shown(number: f64, text: impl Fn(f64) -> String) -> String {
    if number.is_finite() { text(number) } else { "-".into() }
}

/// A table of the runs, and one of the settings in which they differ.
pub fn markdown(runs: &[RunReport]) -> String {
    let mut out = String::from(
        "| run | state | step | loss | val loss | best val loss | tokens | tok/s | training time |\n\
         |---|---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for run in runs {
        let (description, figures) = (&run.description, Figures::of(run));
        let step = shown(figures.step, |step| format!("{step}"));
        let step = description.steps.map_or(step.clone(), |steps| format!("{step}/{steps}"));
        let best = figures.best.map_or("-".into(), |(value, step)| format!("{value:.4} (step {step})"));
        let four = |number: f64| shown(number, |number| format!("{number:.4}"));
        let cells = [
            cell(&description.name),
            description.state.word().into(),
            step,
            four(figures.loss),
            four(figures.val_loss),
            best,
            shown(figures.tokens, crate::train::short),
            shown(figures.tokens_per_s, crate::train::short),
            shown(figures.elapsed, crate::train::human_duration),
        ];
        out.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    out.push_str("\nloss: mean over the last 1% of the steps; tok/s: median.\n");
    let descriptions: Vec<&Description> = runs.iter().map(|run| &run.description).collect();
    let differing = differences(&descriptions);
    if !differing.is_empty() {
        let names: Vec<String> = descriptions.iter().map(|run| cell(&run.name)).collect();
        out.push_str(&format!("\n| setting | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len())));
        for (key, values) in differing {
            let values: Vec<String> = values.iter().map(|value| value.as_deref().map_or("-".into(), cell)).collect();
            out.push_str(&format!("| `{key}` | {} |\n", values.join(" | ")));
        }
    }
    out
}

/// A text inside a Markdown table.
fn cell(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace(['\n', '\r'], " ").replace('<', "&lt;")
}

/// One line a step, one column a quantity, numbers as exact as in metrics.jsonl; empty where there is no value.
pub fn csv(runs: &[RunReport]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in runs.iter().flat_map(|run| run.rows.columns()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut out = format!("run,{}\n", names.join(","));
    for run in runs {
        let name = quoted(&run.description.name);
        let columns: Vec<Option<&[f64]>> = names.iter().map(|name| run.rows.column(name)).collect();
        for row in 0..run.rows.len() {
            out.push_str(&name);
            for column in &columns {
                out.push(',');
                match column.map_or(f64::NAN, |values| values[row]) {
                    value if value.is_nan() => {}
                    value => out.push_str(&format!("{value}")),
                }
            }
            out.push('\n');
        }
    }
    out
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::{Rows, State};
    use super::*;
    use anyhow::Result;

    fn run(name: &str, lr: &str) -> Result<RunReport> {
        let mut rows = Rows::default();
        rows.push(r#"{"step":1,"loss":0.30000000000000004,"tokens":64,"tokens_per_s":10,"step_ms":1500}"#)?;
        rows.push(r#"{"step":2,"loss":0.1,"tokens":128,"tokens_per_s":30,"step_ms":500,"val_loss":1e-7}"#)?;
        let config = vec![("seed".into(), "1".into()), ("optimizer.lr".into(), lr.into())];
        let description = Description {
            id: name.into(),
            name: name.into(),
            state: State::Finished,
            steps: Some(2),
            error: None,
            config,
            samples: Vec::new(),
        };
        Ok(RunReport { description, rows })
    }

    #[test]
    fn csv_keeps_every_digit_and_quotes_what_it_must() -> Result<()> {
        let text = csv(&[run("a,\"b\"", "1")?]);
        let expected = "run,step,loss,tokens,tokens_per_s,step_ms,val_loss\n\
                        \"a,\"\"b\"\"\",1,0.30000000000000004,64,10,1500,\n\
                        \"a,\"\"b\"\"\",2,0.1,128,30,500,0.0000001\n";
        assert_eq!(text, expected);
        Ok(())
    }

    #[test]
    fn markdown_has_a_row_a_run_and_the_settings_that_differ() -> Result<()> {
        let text = markdown(&[run("a|b", "0.1")?, run("c", "0.2")?]);
        assert!(text.contains("| a\\|b | finished | 2/2 | 0.1000 | 0.0000 | 0.0000 (step 2) | 128 | 30 | 2 seconds |"));
        assert!(text.contains("| `optimizer.lr` | 0.1 | 0.2 |") && !text.contains("seed"), "{text}");
        Ok(())
    }
}
