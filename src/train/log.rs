//! What a run writes down as it goes: `metrics.jsonl` (what the mathematics gave), `telemetry.jsonl` (what the machine
//! did), `samples.jsonl`, and TensorBoard's events where they are asked for. All are cut back together on resume.

use super::event_file::EventFile;
use super::journal::Journal;
use super::metrics::{self, Record};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What the machine did during one step. Apart from the metrics, which a repeated run gives again bit for bit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Telemetry {
    pub step: u64,
    /// When the step was written down, seconds since 1970.
    pub time: f64,
    /// Seconds of training up to here, over all processes of the run; evaluations and checkpoints count, pauses do not.
    pub elapsed_s: f64,
    /// Resident memory of the process now, where the system tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// How full the queue of rows ahead of the trainer is, from 0 to 1.
    pub queue: f64,
    /// How long the step waited for data.
    pub waited_ms: f64,
}

/// A text that the model wrote during training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub step: u64,
    pub prompt: String,
    pub text: String,
}

/// Whether a run writes events for TensorBoard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Events {
    None,
    TensorBoard,
}

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The open files of a run.
pub struct RunLog {
    metrics: Journal,
    telemetry: Journal,
    samples: Journal,
    events: Option<EventFile>,
    /// Training seconds before this process.
    elapsed_before: f64,
    started: Instant,
}

impl RunLog {
    /// Opens the files of a run that has done `step` steps; what they say of later steps is cut off.
    pub fn open(run: &Path, step: u64, events: Events) -> Result<Self> {
        let metrics = Journal::open_complete(&run.join("metrics.jsonl"), step)?;
        let telemetry = Journal::open(&run.join("telemetry.jsonl"), step)?;
        let samples = Journal::open(&run.join("samples.jsonl"), step)?;
        let last = telemetry.last().map(serde_json::from_str::<Telemetry>).transpose();
        let last = last.with_context(|| format!("cannot read {}", run.join("telemetry.jsonl").display()))?;
        let events = match events {
            Events::None => None,
            Events::TensorBoard => Some(Self::open_events(run, step)?),
        };
        let elapsed_before = last.map_or(0.0, |last| last.elapsed_s);
        Ok(Self { metrics, telemetry, samples, events, elapsed_before, started: Instant::now() })
    }

    /// A new event file that continues after `step`; the run's first one begins with the steps already done.
    fn open_events(run: &Path, step: u64) -> Result<EventFile> {
        let folder = run.join("tensorboard");
        let first = !folder.exists();
        let mut events = EventFile::create(&folder, step)?;
        if first && step > 0 {
            let telemetry = read_telemetry(run)?;
            let mut telemetry = telemetry.iter().peekable();
            for record in metrics::read(run)? {
                while telemetry.next_if(|line| line.step < record.step).is_some() {}
                let own = telemetry.peek().filter(|line| line.step == record.step);
                events.step(&record, own.copied())?;
            }
            for sample in read_samples(run)? {
                events.sample(&sample, unix_time())?;
            }
        }
        Ok(events)
    }

    /// The telemetry of a step that has just ended.
    pub fn telemetry(&self, step: u64, queue: f64, waited_s: f64) -> Telemetry {
        Telemetry {
            step,
            time: unix_time(),
            elapsed_s: self.elapsed_before + self.started.elapsed().as_secs_f64(),
            memory_bytes: resident_memory_bytes(),
            queue,
            waited_ms: 1e3 * waited_s,
        }
    }

    /// Writes a step down.
    pub fn step(&mut self, record: &Record, telemetry: &Telemetry) -> Result<()> {
        // The metrics come first: a step without telemetry is whole, telemetry without its step is not.
        self.metrics.append(record)?;
        self.telemetry.append(telemetry)?;
        match &mut self.events {
            Some(events) => events.step(record, Some(telemetry)),
            None => Ok(()),
        }
    }

    /// Writes a sample down.
    pub fn sample(&mut self, sample: &Sample) -> Result<()> {
        self.samples.append(sample)?;
        match &mut self.events {
            Some(events) => events.sample(sample, unix_time()),
            None => Ok(()),
        }
    }

    /// Makes what was written survive a power cut.
    pub fn sync(&self) -> Result<()> {
        self.metrics.sync()?;
        self.telemetry.sync()?;
        self.samples.sync()?;
        self.events.as_ref().map_or(Ok(()), EventFile::sync)
    }
}

/// The telemetry of a run; nothing for runs that have none.
pub fn read_telemetry(run: &Path) -> Result<Vec<Telemetry>> {
    read_lines(&run.join("telemetry.jsonl"))
}

/// The samples of a run; nothing for runs that have none.
pub fn read_samples(run: &Path) -> Result<Vec<Sample>> {
    read_lines(&run.join("samples.jsonl"))
}

/// The whole lines of a file that a trainer may be writing: a last line without its end is not there yet.
fn read_lines<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Vec<T>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(number, line): (usize, &str)| {
        serde_json::from_str(line)
            .with_context(|| format!("{}:{}: not a line of this file", path.display(), number + 1))
    };
    whole.lines().enumerate().map(parse).collect()
}

/// Resident memory of this process now.
fn resident_memory_bytes() -> Option<u64> {
    super::progress::memory_of_process("VmRSS:")
}
