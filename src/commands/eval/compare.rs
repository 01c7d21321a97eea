//! `vrtrain eval --compare A B`: whether two models differ on the same problems, by McNemar's test.

use super::Share;
use super::samples;
use crate::commands::{Ending, print_json};
use crate::eval::mcnemar::Table;
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::path::Path;

/// Compares two files that `--samples` wrote.
pub fn run(first: &Path, second: &Path, json: bool) -> Result<Ending> {
    let (a, b) = (samples::read(first)?.samples, samples::read(second)?.samples);
    let [a_name, b_name] = [first, second].map(|path| path.display().to_string());
    ensure!(!a.is_empty(), "{a_name} has no samples");
    ensure!(a.len() == b.len(), "{a_name} has {} samples, {b_name} {}: not the same problems", a.len(), b.len());
    let first_metrics = [a[0]["metric"].clone(), b[0]["metric"].clone()];
    let mut table = Table::default();
    let mut other_prompts = 0;
    for (index, (a, b)) in a.iter().zip(&b).enumerate() {
        let same = a["task"] == b["task"] && a["problem_sha256"] == b["problem_sha256"];
        ensure!(same, "problem {index} is another in {a_name} than in {b_name}");
        // A file of two metrics would compare two rules.
        ensure!(
            a["metric"] == first_metrics[0] && b["metric"] == first_metrics[1],
            "problem {index} is judged by another metric than the first in {a_name} or {b_name}"
        );
        other_prompts += usize::from(a["prompt_sha256"] != b["prompt_sha256"]);
        table.add(a["right"] == true, b["right"] == true);
    }
    if other_prompts > 0 {
        eprintln!("note: {other_prompts} of the {} problems were put in other words", a.len());
    }
    let metric = |samples: &[Value]| samples[0]["metric"].as_str().unwrap_or("right").to_owned();
    ensure!(metric(&a) == metric(&b), "{a_name} counts {}, {b_name} {}", metric(&a), metric(&b));
    let problems = a.len();
    let shares = [table.both + table.only_first, table.both + table.only_second]
        .map(|right| Share::of(right as usize, problems));
    let test = table.test();
    if json {
        print_json(&json!({
            "metric": metric(&a),
            "a": shares[0].value,
            "b": shares[1].value,
            "both": table.both,
            "only_a": table.only_first,
            "only_b": table.only_second,
            "neither": table.neither,
            "p_value": test.p_value,
            "method": test.method.word(),
            "n": problems,
        }))?;
        return Ok(Ending::Done);
    }
    println!("{}: A {} ({a_name}), B {} ({b_name}), {problems} problems", metric(&a), shares[0], shares[1]);
    println!(
        "right in both {}, in A alone {}, in B alone {}, in neither {}",
        table.both, table.only_first, table.only_second, table.neither
    );
    println!("McNemar's test ({}): p = {:.4}", test.method.word(), test.p_value);
    Ok(Ending::Done)
}
