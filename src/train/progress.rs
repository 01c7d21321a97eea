//! What a person sees of a run: a live display on a terminal, plain lines elsewhere, on stderr; and for programs, if they
//! ask, one JSON object a step on stdout.

mod layout;
mod screen;
mod sparkline;

use super::log::Telemetry;
use super::metrics::Record;
use indicatif::{FormattedDuration, HumanDuration};
use layout::{Frame, Line, Tone};
use screen::Screen;
use sparkline::History;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How much to show on stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    Normal,
    Quiet,
}

/// What goes to stdout while a run trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepLines {
    None,
    /// One JSON object a step, with the fields of metrics.jsonl.
    Json,
}

/// Where the process computes and how fast that could be, for the model FLOPs utilisation.
#[derive(Clone, Debug)]
pub struct Peak {
    /// FLOP/s of the device's products; `None`: unknown.
    pub flops_per_s: Option<f64>,
    pub flops_per_token: f64,
}

/// What the trainer does besides steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Training,
    Validating,
    Sampling,
    Saving,
}

enum Display {
    Live(Screen),
    Lines { last: Option<Instant> },
    Quiet,
}

/// The display of one run.
pub struct Progress {
    display: Display,
    step_lines: StepLines,
    total: u64,
    first: u64,
    peak: Peak,
    started: Instant,
    validation: Option<f64>,
    loss: History,
    gate: History,
    /// Seconds of the steps that averages use: the first step of a process is left out.
    timed: Vec<f64>,
    /// The last step shown, as a plain line.
    last_line: Option<String>,
}

/// Without a terminal a line at most this often, besides the first, the last and evaluations.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

impl Progress {
    /// A display for steps `first + 1 ..= total`.
    pub fn new(verbosity: Verbosity, step_lines: StepLines, first: u64, total: u64, peak: Peak) -> Self {
        let capable = std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let display = match verbosity {
            Verbosity::Quiet => Display::Quiet,
            Verbosity::Normal if std::io::stderr().is_terminal() && capable => Display::Live(Screen::from_env()),
            Verbosity::Normal => Display::Lines { last: None },
        };
        Self {
            display,
            step_lines,
            total,
            first,
            peak,
            started: Instant::now(),
            validation: None,
            loss: History::default(),
            gate: History::default(),
            timed: Vec::new(),
            last_line: None,
        }
    }

    /// Takes up the curves of the steps that earlier processes of the run did.
    pub fn recall(&mut self, records: &[Record]) {
        for record in records.iter().filter(|record| record.step <= self.first) {
            self.validation = record.val_loss.or(self.validation);
            self.loss.push(record.loss);
            self.gate.push(record.gate);
        }
    }

    /// Prints a line that stays.
    pub fn note(&mut self, text: &str) {
        match &mut self.display {
            Display::Live(screen) => screen.print_above(text),
            Display::Lines { .. } => print_line(text),
            Display::Quiet => {}
        }
    }

    /// Says what the trainer is at.
    pub fn stage(&mut self, stage: Stage) {
        if let Display::Live(screen) = &mut self.display {
            screen.set_stage(match stage {
                Stage::Training => None,
                Stage::Validating => Some("validating"),
                Stage::Sampling => Some("sampling"),
                Stage::Saving => Some("saving"),
            });
        }
    }

    /// Shows a step that is done.
    pub fn step(&mut self, record: &Record, telemetry: &Telemetry) {
        if self.step_lines == StepLines::Json && print_json_line(record).is_err() {
            // Whoever read stdout is gone; a run of days goes on.
            self.step_lines = StepLines::None;
            self.note("stdout was closed: no more JSON lines");
        }
        if matches!(self.display, Display::Quiet) {
            return;
        }
        if record.step > self.first + 1 {
            self.timed.push(record.step_ms / 1e3);
        }
        self.validation = record.val_loss.or(self.validation);
        self.loss.push(record.loss);
        self.gate.push(record.gate);
        let plain = self.plain_line(record, telemetry);
        let edge = record.step == self.first + 1 || record.step == self.total || record.val_loss.is_some();
        let frame = matches!(self.display, Display::Live(_)).then(|| self.frame(record, telemetry));
        match (&mut self.display, frame) {
            (Display::Live(screen), Some(frame)) => {
                if let Some(loss) = record.val_loss {
                    screen.print_above(&format!("step {} validation loss {loss:.4}", record.step));
                }
                screen.show(frame);
            }
            (Display::Lines { last }, _) if edge || last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) => {
                *last = Some(Instant::now());
                print_line(&plain);
            }
            _ => {}
        }
        self.last_line = Some(plain);
    }

    fn plain_line(&self, record: &Record, telemetry: &Telemetry) -> String {
        let percent = 100.0 * record.step as f64 / self.total as f64;
        let validation = self.validation.map_or(String::new(), |loss| format!(" val {loss:.4}"));
        let left = self.time_left(record).map_or("-".into(), |left| human_duration(left.as_secs_f64()));
        let parts = self.machine_parts(record, telemetry).join(" | ");
        format!(
            "step {}/{} ({percent:.1}%) | loss {:.4}{validation} | norm {:.3} | lr {:.3e} gate {:.3} | {parts} | ETA {left}",
            record.step, self.total, record.loss, record.grad_norm, record.eta, record.gate,
        )
    }

    /// What the step cost: time, speed, utilisation, memory, data.
    fn machine_parts(&self, record: &Record, telemetry: &Telemetry) -> Vec<String> {
        let speed = self.tokens_per_s(record);
        let utilisation = match (self.peak.flops_per_s, speed) {
            (Some(peak), Some(speed)) => format!("{:.0}% MFU", 100.0 * speed * self.peak.flops_per_token / peak),
            (None, _) => "MFU ? (unknown device)".into(),
            (_, None) => "MFU -".into(),
        };
        let mut parts = vec![format!("{:.0} ms", record.step_ms)];
        parts.push(speed.map_or("- tok/s".into(), |speed| format!("{} tok/s", short(speed))));
        parts.push(utilisation);
        parts.extend(telemetry.memory_bytes.map(|bytes| format!("{:.2} GiB", bytes as f64 / GIB)));
        parts.push(format!("data queue {:.0}%", 100.0 * telemetry.queue));
        if telemetry.waited_ms > 0.05 * record.step_ms {
            parts.push(format!("waited {:.0} ms for data", telemetry.waited_ms));
        }
        parts
    }

    fn frame(&self, record: &Record, telemetry: &Telemetry) -> Frame {
        use Tone::{Gate, Label, Loss, Strong};
        let left = self.time_left(record).map_or("-".into(), |left| FormattedDuration(left).to_string());
        let mut loss = Line::default().put(Label, "loss ").put(Strong, &format!("{:<8.4}", record.loss));
        loss = match self.validation {
            Some(validation) => loss.put(Label, "  val ").put(Strong, &format!("{validation:<8.4}")),
            None => loss.put(Label, "  val -       "),
        };
        let gate = Line::default().put(Label, "gate ").put(Strong, &format!("{:<8.4}", record.gate));
        let gate = gate.put(Label, "  eta ").put(Strong, &format!("{:<8.2e}", record.eta));
        let mut parts = vec![format!("norm {:.3}", record.grad_norm)];
        parts.extend(self.machine_parts(record, telemetry));
        Frame {
            step: record.step,
            total: self.total,
            left,
            curves: vec![
                (loss, Loss, self.loss.clone(), sparkline::Scale::Own),
                (gate, Gate, self.gate.clone(), sparkline::Scale::Share),
            ],
            parts,
        }
    }

    /// Speed over the last steps of this process, its first step left out.
    fn tokens_per_s(&self, record: &Record) -> Option<f64> {
        let window = &self.timed[self.timed.len().saturating_sub(20)..];
        let seconds: f64 = window.iter().sum();
        let tokens_per_step = record.tokens as f64 / record.step as f64;
        (seconds > 0.0).then(|| tokens_per_step * window.len() as f64 / seconds)
    }

    fn time_left(&self, record: &Record) -> Option<Duration> {
        let done = record.step.checked_sub(self.first)?;
        let steps_left = self.total.saturating_sub(record.step) as f64;
        // Evaluations and checkpoints count: they are part of what is left.
        let seconds = self.started.elapsed().as_secs_f64() / done as f64 * steps_left;
        (done >= 2).then(|| Duration::from_secs_f64(seconds))
    }

    /// Takes the live display off the terminal; the last step stays as a line.
    pub fn finish(&mut self) {
        if let Display::Live(screen) = &mut self.display {
            screen.clear();
            if let Some(line) = self.last_line.take() {
                print_line(&line);
            }
            self.display = Display::Lines { last: Some(Instant::now()) };
        }
    }
}

pub const GIB: f64 = (1u64 << 30) as f64;

fn print_line(text: &str) {
    // A closed stderr must not end a run of days.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn print_json_line(record: &Record) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()
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

/// 75.0 -> "1 minute"
pub fn human_duration(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds).map_or("unknown".into(), |duration| HumanDuration(duration).to_string())
}

/// Largest resident memory of this process so far, where the system tells it.
pub fn peak_memory_bytes() -> Option<u64> {
    memory_of_process("VmHWM:")
}

/// One line of what Linux tells about this process's memory.
pub(super) fn memory_of_process(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
