//! What a person sees of a run: a live display on a terminal, plain lines elsewhere. All of it goes to stderr.

use super::Record;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How much to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    Normal,
    Quiet,
}

/// Where the process computes and how fast that could be, for the model FLOPs utilisation.
#[derive(Clone, Debug)]
pub struct Peak {
    /// FLOP/s of the device's products; `None`: unknown.
    pub flops_per_s: Option<f64>,
    pub flops_per_token: f64,
}

/// The display of one run.
pub struct Progress {
    bar: Option<ProgressBar>,
    verbosity: Verbosity,
    total: u64,
    first: u64,
    peak: Peak,
    started: Instant,
    last_line: Option<Instant>,
    validation: Option<f64>,
    /// Seconds of the steps that averages use: the first step of a process is left out.
    timed: Vec<f64>,
}

/// Without a terminal a line at most this often, besides the first, the last and evaluations.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

impl Progress {
    /// A display for steps `first + 1 ..= total`.
    pub fn new(verbosity: Verbosity, first: u64, total: u64, peak: Peak) -> Self {
        let terminal = verbosity == Verbosity::Normal && std::io::stderr().is_terminal();
        let bar = terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} ({percent}%) ETA {prefix}\n{wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_position(first);
            bar
        });
        let now = Instant::now();
        Self { bar, verbosity, total, first, peak, started: now, last_line: None, validation: None, timed: Vec::new() }
    }

    /// Prints a line that stays.
    pub fn note(&self, text: &str) {
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        match &self.bar {
            Some(bar) => bar.suspend(|| print_line(text)),
            None => print_line(text),
        }
    }

    /// Shows a step that is done; `waited` is how long it waited for data, in seconds.
    pub fn step(&mut self, record: &Record, waited: f64, queue: &str) {
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        if record.step > self.first + 1 {
            self.timed.push(record.step_ms / 1e3);
        }
        self.validation = record.val_loss.or(self.validation);
        let line = self.line(record, waited, queue);
        match &self.bar {
            Some(bar) => {
                bar.set_position(record.step);
                bar.set_prefix(self.time_left(record));
                bar.set_message(line);
                if let Some(loss) = record.val_loss {
                    self.note(&format!("step {} validation loss {loss:.4}", record.step));
                }
            }
            None => {
                let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
                let edge = record.step == self.first + 1 || record.step == self.total || record.val_loss.is_some();
                if due || edge {
                    self.last_line = Some(Instant::now());
                    let percent = 100.0 * record.step as f64 / self.total as f64;
                    let left = self.time_left(record);
                    print_line(&format!("step {}/{} ({percent:.1}%) | {line} | ETA {left}", record.step, self.total));
                }
            }
        }
    }

    fn line(&self, record: &Record, waited: f64, queue: &str) -> String {
        let speed = self.tokens_per_s(record);
        let utilisation = match (self.peak.flops_per_s, speed) {
            (Some(peak), Some(speed)) => format!("{:.0}% MFU", 100.0 * speed * self.peak.flops_per_token / peak),
            (None, _) => "MFU ? (unknown device)".into(),
            (_, None) => "MFU -".into(),
        };
        let speed = speed.map_or("- tok/s".into(), |speed| format!("{} tok/s", short(speed)));
        let validation = self.validation.map_or(String::new(), |loss| format!(" val {loss:.4}"));
        let wait = if waited > 0.05 * record.step_ms / 1e3 {
            format!(" | waited {:.0} ms for data", waited * 1e3)
        } else {
            String::new()
        };
        let memory = peak_memory_bytes().map_or(String::new(), |bytes| format!(" | {:.2} GiB", bytes as f64 / GIB));
        format!(
            "loss {:.4}{validation} | norm {:.3} | lr {:.3e} gate {:.3} | {:.0} ms | {speed} | {utilisation}{memory}{queue}{wait}",
            record.loss, record.grad_norm, record.eta, record.gate, record.step_ms,
        )
    }

    /// Speed over the last steps of this process, its first step left out.
    fn tokens_per_s(&self, record: &Record) -> Option<f64> {
        let window = &self.timed[self.timed.len().saturating_sub(20)..];
        let seconds: f64 = window.iter().sum();
        let tokens_per_step = record.tokens as f64 / record.step as f64;
        (seconds > 0.0).then(|| tokens_per_step * window.len() as f64 / seconds)
    }

    fn time_left(&self, record: &Record) -> String {
        let done = record.step - self.first;
        if done < 2 {
            return "-".into();
        }
        let steps_left = self.total.saturating_sub(record.step) as f64;
        // Evaluations and checkpoints count: they are part of what is left.
        let seconds = self.started.elapsed().as_secs_f64() / done as f64 * steps_left;
        HumanDuration(Duration::from_secs_f64(seconds)).to_string()
    }

    /// Takes the live display off the terminal.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

pub const GIB: f64 = (1u64 << 30) as f64;

fn print_line(text: &str) {
    // A closed stderr must not end a run of days.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// 1234567 -> "1.23M"
pub fn short(number: f64) -> String {
    match number {
        n if n >= 1e9 => format!("{:.2}G", n / 1e9),
        n if n >= 1e6 => format!("{:.2}M", n / 1e6),
        n if n >= 1e4 => format!("{:.1}k", n / 1e3),
        n => format!("{n:.0}"),
    }
}

/// Largest resident memory of this process so far, where the system tells it.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
