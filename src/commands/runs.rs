//! `vrtrain runs`: the runs below a folder, with their states.

use super::{Ending, print_json};
use crate::config::ConfigError;
use crate::report::{State, Summary, find};
use crate::train::{human_duration, short, unix_time};
use anyhow::Result;
use std::path::PathBuf;

/// Lists the runs.
pub fn run(folder: Option<PathBuf>, json: bool) -> Result<Ending> {
    let folder = folder.unwrap_or_else(|| {
        let usual = PathBuf::from("runs");
        if usual.is_dir() { usual } else { PathBuf::from(".") }
    });
    let found = find(std::slice::from_ref(&folder)).map_err(|error| ConfigError::flag("DIR", format!("{error:#}")))?;
    let mut summaries = Vec::new();
    for found in &found {
        match Summary::read(found) {
            Ok(summary) => summaries.push(summary),
            // One torn run must not hide the others.
            Err(error) => eprintln!("{}: {error:#}", found.path.display()),
        }
    }
    let unreadable = found.len() - summaries.len();
    if json {
        print_json(&serde_json::Value::Array(summaries.iter().map(Summary::to_json).collect()))?;
    } else if found.is_empty() {
        eprintln!("there is no run in {}", folder.display());
    } else {
        print_table(&summaries)?;
    }
    Ok(if unreadable == 0 { Ending::Done } else { Ending::Failed })
}

const HEADS: [&str; 7] = ["RUN", "STATE", "STEP", "LOSS", "VAL", "TOK/S", "LAST SEEN"];

fn print_table(summaries: &[Summary]) -> Result<()> {
    use std::io::Write;
    let now = unix_time();
    let four = |loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{loss:.4}"));
    let mut rows = vec![HEADS.map(str::to_owned)];
    rows.extend(summaries.iter().map(|summary| {
        let steps = summary.steps.map_or("?".into(), |steps| steps.to_string());
        let speed = summary.tokens_per_s.map_or("-".into(), short);
        [
            summary.name.clone(),
            summary.state.word().into(),
            format!("{}/{steps}", summary.step),
            four(summary.loss),
            four(summary.val_loss),
            speed,
            format!("{} ago", human_duration((now - summary.last_seen).max(0.0))),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEADS.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 | 1 | 6 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    for summary in summaries {
        if let Some(error) = &summary.error {
            text.push_str(&format!("\n{} failed: {error}\n", summary.name));
        }
        if summary.state == State::Dead {
            let resume = format!("--run-dir {} --resume", summary.path);
            text.push_str(&format!("\n{} is dead: its process is gone; continue with {resume}\n", summary.name));
        }
    }
    std::io::stdout().write_all(text.as_bytes()).map_err(|error| anyhow::anyhow!("cannot write to stdout: {error}"))
}
