//! `status.json` in a run folder: which process trains it, and how the last one ended. It tells a run that goes on from
//! one whose process is gone.

use super::checkpoint::replace_file;
use super::log::unix_time;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use sysinfo::{Pid, ProcessStatus, ProcessesToUpdate, System};

/// Where a process of a run stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Phase {
    Running,
    Finished,
    /// Stopped by a signal after saving.
    Interrupted,
    Failed {
        error: String,
    },
}

/// The content of `status.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    #[serde(flatten)]
    pub phase: Phase,
    /// The run's last step.
    pub steps: u64,
    pub host: String,
    pub pid: u32,
    /// When the process began, seconds since 1970: a number that a later process of the same pid does not have.
    pub process_started: u64,
    /// When this file was written, seconds since 1970.
    pub time: f64,
}

/// Whether the process of a status is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    Alive,
    Gone,
    /// It runs, or ran, on another machine.
    Elsewhere,
}

/// The start of a process as the system reckons it may move by the clock's corrections.
const START_TOLERANCE_S: u64 = 2;

fn path(run: &Path) -> std::path::PathBuf {
    run.join("status.json")
}

impl Status {
    /// The status of this process.
    pub fn of_this_process(phase: Phase, steps: u64) -> Self {
        let pid = std::process::id();
        let process_started = process_start(pid).unwrap_or(0);
        Self { phase, steps, host: host(), pid, process_started, time: unix_time() }
    }

    pub fn write(&self, run: &Path) -> Result<()> {
        replace_file(&path(run), &serde_json::to_vec_pretty(self)?)
    }

    /// The status of a run; runs of earlier versions have none.
    pub fn read(run: &Path) -> Result<Option<Self>> {
        let path = path(run);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        serde_json::from_slice(&text).map(Some).with_context(|| format!("{} is not a run's status", path.display()))
    }

    /// Whether the process that wrote this is still there. A later process with its pid is another one.
    pub fn liveness(&self) -> Liveness {
        if self.host != host() {
            return Liveness::Elsewhere;
        }
        match process_start(self.pid) {
            Some(started) if started.abs_diff(self.process_started) <= START_TOLERANCE_S => Liveness::Alive,
            _ => Liveness::Gone,
        }
    }
}

fn host() -> String {
    System::host_name().unwrap_or_else(|_| "unknown".into())
}

/// When a process began, seconds since 1970.
fn process_start(pid: u32) -> Option<u64> {
    let mut system = System::new().ok()?;
    let pid = Pid::from_u32(pid);
    system.refresh_processes(ProcessesToUpdate::Some(&[pid]), true);
    let process = system.process(pid)?;
    // A killed process that nobody has waited for yet does no work.
    let dead = matches!(process.status(), ProcessStatus::Zombie | ProcessStatus::Dead);
    (!dead).then(|| process.start_time())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_pid() -> Result<()> {
        let run = tempfile::tempdir()?;
        assert_eq!(Status::read(run.path())?, None);
        let mut status = Status::of_this_process(Phase::Failed { error: "no disk".into() }, 7);
        status.write(run.path())?;
        assert_eq!(Status::read(run.path())?, Some(status.clone()));
        assert_eq!(status.liveness(), Liveness::Alive);
        status.process_started -= 60;
        assert_eq!(status.liveness(), Liveness::Gone);
        status.host += "-other";
        assert_eq!(status.liveness(), Liveness::Elsewhere);
        // More than any system gives.
        status = Status { pid: 0x7fff_fff0, ..Status::of_this_process(Phase::Running, 7) };
        assert_eq!(status.liveness(), Liveness::Gone);
        Ok(())
    }
}
