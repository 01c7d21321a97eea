//! Runs as processes of their own: several side by side, stopped early, interrupted together, their errors told.

use crate::train::{Interrupt, RunFolder};
use anyhow::{Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A run to be made.
#[derive(Clone, Debug)]
pub struct Job {
    /// What messages call it.
    pub label: String,
    /// Arguments of this very program.
    pub arguments: Vec<String>,
    /// The run's folder.
    pub run: PathBuf,
    /// Where its standard error goes; its last line tells why it failed.
    pub log: PathBuf,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    /// Stopped by the watcher.
    Stopped,
    /// It ended with an error; its own words.
    Failed(String),
    /// The configuration was refused; its own words.
    Refused(String),
    /// It was killed by someone else.
    Killed(String),
}

/// Whether a run's own words say that it diverged, which is a finding; other failures are none.
pub fn is_divergence(why: &str) -> bool {
    ["not finite", " is NaN", " is inf", " is -inf"].iter().any(|word| why.contains(word))
}

/// What the watcher thinks of a run that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    Continue,
    Stop,
}

/// Whether all jobs have ended or someone asked for an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    All,
    Interrupted,
}

/// A running job.
struct Running {
    index: usize,
    child: Child,
    stopped: bool,
    /// How often it found its folder taken.
    waited: usize,
}

/// How often a run is looked at, or tried, whose folder another process holds.
const TRIES: usize = 300;

/// How often running jobs are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Runs `jobs` in order, `workers` at a time. `watch` may stop a run; `ended` hears of each end, in the order of the ends.
///
/// # Errors
/// When a process cannot be started, or `ended` refuses; running jobs are interrupted then.
pub fn run_all(
    jobs: &[Job],
    workers: usize,
    interrupt: &Interrupt,
    watch: &mut dyn FnMut(usize) -> Watch,
    ended: &mut dyn FnMut(usize, End) -> Result<()>,
) -> Result<Finish> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let threads = (rayon::current_num_threads() / workers.max(1)).max(1);
    let mut waiting = jobs.iter().enumerate().peekable();
    let mut looks = 0;
    let mut running: Vec<Running> = Vec::new();
    let mut outcome = Ok(Finish::All);
    loop {
        while running.len() < workers.max(1) && outcome.as_ref().is_ok_and(|finish| *finish == Finish::All) {
            let Some(&(index, job)) = waiting.peek() else { break };
            // A worker that a killed study left may still be saving itself, and its last words would go into the log
            // of the one that takes its run up.
            if RunFolder::is_in_use(&job.run) && looks < TRIES {
                looks += 1;
                break;
            }
            waiting.next();
            looks = 0;
            match start(&program, job, threads) {
                Ok(child) => running.push(Running { index, child, stopped: false, waited: 0 }),
                Err(error) => outcome = Err(error),
            }
        }
        let all_begun = waiting.peek().is_none() || !outcome.as_ref().is_ok_and(|finish| *finish == Finish::All);
        if running.is_empty() && all_begun {
            return outcome;
        }
        std::thread::sleep(LOOK);
        let mut still = Vec::with_capacity(running.len());
        for mut job in running {
            let label = &jobs[job.index].label;
            match job.child.try_wait().with_context(|| format!("cannot wait for {label}"))? {
                None => {
                    if !job.stopped && watch(job.index) == Watch::Stop {
                        job.stopped = true;
                        terminate(&mut job.child);
                    }
                    still.push(job);
                }
                Some(status) => {
                    let end = if job.stopped { End::Stopped } else { end_of(status, &jobs[job.index].log) };
                    let taken = matches!(&end, End::Failed(why) if why.contains("is in use by another vrtrain"));
                    if taken && job.waited < TRIES {
                        std::thread::sleep(LOOK);
                        let child = start(&program, &jobs[job.index], threads)?;
                        still.push(Running { child, waited: job.waited + 1, ..job });
                        continue;
                    }
                    // An interrupted run has saved itself and is taken up again next time.
                    if status.code() == Some(3) && !job.stopped {
                        outcome = outcome.map(|_| Finish::Interrupted);
                    } else if let Err(error) = ended(job.index, end) {
                        outcome = Err(error);
                    }
                }
            }
        }
        running = still;
        let ending = !outcome.as_ref().is_ok_and(|finish| *finish == Finish::All);
        if ending || interrupt.requested() {
            outcome = outcome.map(|_| Finish::Interrupted);
            for job in running.iter_mut().filter(|job| !job.stopped) {
                terminate(&mut job.child);
                // Their end is an interruption, not an early stop.
            }
            for mut job in running {
                let status = job.child.wait().context("cannot wait for a run")?;
                if status.success() {
                    ended(job.index, if job.stopped { End::Stopped } else { End::Done })?;
                }
            }
            return outcome;
        }
    }
}

fn start(program: &Path, job: &Job, threads: usize) -> Result<Child> {
    let log = File::create(&job.log).with_context(|| format!("cannot write {}", job.log.display()))?;
    let mut command = Command::new(program);
    command.args(&job.arguments).env("RAYON_NUM_THREADS", threads.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    set_apart(&mut command);
    command.spawn().with_context(|| format!("cannot start {}", job.label))
}

/// Keeps the terminal's signals from a run, which hears of them from here, once; and lets it end if this process is killed.
#[cfg(unix)]
fn set_apart(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, set_parent_process_death_signal};
        let die_with_parent = || Ok(set_parent_process_death_signal(Some(Signal::TERM))?);
        // SAFETY: the closure makes one system call and touches no memory of the parent.
        unsafe { command.pre_exec(die_with_parent) };
    }
}

#[cfg(not(unix))]
fn set_apart(_: &mut Command) {}

/// Asks a run to save and end.
fn terminate(child: &mut Child) {
    #[cfg(unix)]
    {
        let asked = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = asked
            && rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok()
        {
            return;
        }
    }
    // It has ended already where this fails.
    let _ = child.kill();
}

fn end_of(status: ExitStatus, log: &Path) -> End {
    let words = || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let line = text.lines().rev().find(|line| line.starts_with("error: ")).or_else(|| text.lines().next_back());
        line.map_or("it said nothing".to_owned(), |line| line.trim_start_matches("error: ").to_owned())
    };
    match status.code() {
        Some(0) => End::Done,
        Some(2) => End::Refused(words()),
        Some(_) => End::Failed(words()),
        None => End::Killed(format!("{status}")),
    }
}
