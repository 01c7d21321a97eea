//! `vrtrain eval`: what a run or a model is worth on a task.

mod choices;
mod compare;
mod data;
mod gsm8k;
mod perplexity;
mod samples;

pub use compare::run as compare;

use super::Ending;
use crate::config::ConfigError;
use crate::ops::product::Precision;
use anyhow::Result;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    Perplexity,
    Gsm8k,
    HellaSwag,
    Lambada,
}

/// How a problem is put (`--prompt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptStyle {
    /// As lm-evaluation-harness puts it.
    Harness,
    /// GSM8K with the fixed eight chains of thought.
    ChainOfThought,
    /// GSM8K in the text that a model was fine-tuned on.
    Template,
    /// GSM8K through the model's chat template.
    Chat,
}

/// Whose rule decides what counts as right in GSM8K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grader {
    Harness,
    OpenAi,
}

/// What the command line asked for. What a task has no use for must be left out.
#[derive(Clone, Debug)]
pub struct Options {
    pub target: String,
    pub task: Task,
    /// A file, a folder or a hub data set.
    pub data: Option<String>,
    /// Globs that choose files of it.
    pub files: Vec<String>,
    pub text_column: Option<String>,
    pub window: Option<usize>,
    pub stride: Option<usize>,
    pub max_tokens: Option<u64>,
    /// Only the first so many problems.
    pub limit: Option<usize>,
    pub prompt: Option<PromptStyle>,
    pub template: Option<String>,
    pub shots: Option<usize>,
    /// Where the examples before a question come from.
    pub shots_from: Option<String>,
    pub seed: Option<u64>,
    pub grader: Option<Grader>,
    pub calculator: bool,
    pub max_new_tokens: Option<usize>,
    pub batch: Option<usize>,
    pub precision: Precision,
    /// Where one JSON object a problem goes.
    pub samples: Option<PathBuf>,
    pub resume: bool,
    pub json: bool,
}

/// Runs the task and prints its result.
pub fn run(options: &Options) -> Result<Ending> {
    refuse_what_the_task_ignores(options)?;
    match options.task {
        Task::Perplexity => perplexity::run(options),
        Task::Gsm8k => gsm8k::run(options),
        Task::HellaSwag => choices::hellaswag(options),
        Task::Lambada => choices::lambada(options),
    }
}

fn refuse_what_the_task_ignores(options: &Options) -> Result<(), ConfigError> {
    use Task::{Gsm8k, HellaSwag, Lambada, Perplexity};
    let given: [(&str, bool, &[Task]); 15] = [
        ("--text-column", options.text_column.is_some(), &[Perplexity, Lambada]),
        ("--window", options.window.is_some(), &[Perplexity]),
        ("--stride", options.stride.is_some(), &[Perplexity]),
        ("--max-tokens", options.max_tokens.is_some(), &[Perplexity]),
        ("--limit", options.limit.is_some(), &[Gsm8k, HellaSwag, Lambada]),
        ("--prompt", options.prompt.is_some(), &[Gsm8k]),
        ("--template", options.template.is_some(), &[Gsm8k]),
        ("--shots", options.shots.is_some(), &[Gsm8k]),
        ("--shots-from", options.shots_from.is_some(), &[Gsm8k]),
        ("--seed", options.seed.is_some(), &[Gsm8k]),
        ("--grader", options.grader.is_some(), &[Gsm8k]),
        ("--calculator", options.calculator, &[Gsm8k]),
        ("--max-new-tokens", options.max_new_tokens.is_some(), &[Gsm8k]),
        ("--batch", options.batch.is_some(), &[Gsm8k]),
        ("--samples", options.samples.is_some(), &[Gsm8k, HellaSwag, Lambada]),
    ];
    for (flag, is_given, tasks) in given {
        if is_given && !tasks.contains(&options.task) {
            return Err(ConfigError::flag(flag, format!("the task {} has no use for it", options.task.word())));
        }
    }
    if options.resume && (options.samples.is_none() || options.task != Gsm8k) {
        return Err(ConfigError::flag("--resume", "it goes on with the --samples file of --task gsm8k"));
    }
    if options.limit == Some(0) {
        return Err(ConfigError::flag("--limit", "it must be at least 1"));
    }
    Ok(())
}

/// How many of the problems that there are `--limit` leaves.
fn limited(options: &Options, there: usize) -> usize {
    let limit = options.limit.unwrap_or(there);
    if limit > there {
        eprintln!("--limit {limit}: there are {there} problems, all of them are taken");
    }
    limit.min(there)
}

impl Task {
    fn word(self) -> &'static str {
        match self {
            Self::Perplexity => "perplexity",
            Self::Gsm8k => "gsm8k",
            Self::HellaSwag => "hellaswag",
            Self::Lambada => "lambada",
        }
    }
}

/// A share and its standard error, sqrt(p (1 - p) / (n - 1)), as lm-evaluation-harness has it; none for one problem.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Share {
    value: f64,
    standard_error: Option<f64>,
}

impl Share {
    fn of(right: usize, all: usize) -> Self {
        let value = right as f64 / all as f64;
        let standard_error = (all > 1).then(|| (value * (1.0 - value) / (all - 1) as f64).sqrt());
        Self { value, standard_error }
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2}%", 100.0 * self.value)?;
        self.standard_error.map_or(Ok(()), |error| write!(f, " ± {:.2}", 100.0 * error))
    }
}

/// A line on stderr now and then.
struct Progress {
    began: Instant,
    last: Instant,
}

impl Progress {
    const EVERY: Duration = Duration::from_secs(10);

    fn start() -> Self {
        Self { began: Instant::now(), last: Instant::now() }
    }

    fn tell(&mut self, line: impl FnOnce(Duration) -> String) {
        if self.last.elapsed() >= Self::EVERY {
            self.last = Instant::now();
            eprintln!("{}", line(self.began.elapsed()));
        }
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::Share;

    /// lm-evaluation-harness: the sample's standard deviation over sqrt(n); [1, 0, 0, 1, 0] by hand.
    #[test]
    fn the_standard_error_is_the_samples() {
        let share = Share::of(2, 5);
        let mean = 0.4f64;
        let variance = (2.0 * (1.0 - mean).powi(2) + 3.0 * mean.powi(2)) / 4.0;
        let off = share.standard_error.map(|error| (error - (variance / 5.0).sqrt()).abs());
        assert!(share.value == mean && off.is_some_and(|off| off < 1e-12), "{share:?}");
        assert_eq!(Share::of(1, 1).standard_error, None);
        assert_eq!(share.to_string(), "40.00% ± 24.49");
    }
}
