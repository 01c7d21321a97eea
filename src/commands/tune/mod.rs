//! `vrtrain tune`: a learning-rate range test, a search over config keys, and the gate's constants from a short run.

mod gate;
mod one_run;
mod range;
mod search;

pub use gate::{GateOptions, gate};
pub use range::{RangeOptions, range};
pub use search::{SearchOptions, search};

use super::study_base::Base;
use super::workers::{End, Finish, Job, Watch, run_all};
use crate::config::{ConfigError, Settings};
use crate::optim::OptimizerConfig;
use crate::train::Interrupt;
use anyhow::{Result, bail};
use std::path::PathBuf;

/// The config that is tuned.
#[derive(Clone, Debug)]
pub struct Subject {
    pub task: Option<String>,
    pub config: Option<PathBuf>,
    pub assignments: Vec<String>,
    /// In place of the config's optimizer, with default keys.
    pub optimizer: Option<String>,
}

impl Subject {
    fn base(&self) -> Result<Base> {
        let base = match (&self.task, &self.config) {
            (Some(_), Some(_)) => {
                return Err(ConfigError::flag("--task", "it conflicts with --config: give one").into());
            }
            (None, None) => return Err(ConfigError::flag("--config", "give a config or --task").into()),
            (Some(task), None) => Base::preset(task, &self.assignments)?,
            (None, Some(config)) => Base::load(config, &self.assignments)?,
        };
        let Some(name) = &self.optimizer else { return Ok(base) };
        let mut given = Settings::default();
        for assignment in &self.assignments {
            given.set(assignment)?;
        }
        if let Some(other) = given.text("optimizer.name").filter(|other| other != name) {
            let message = format!("it says {name}, and --set says optimizer.name = {other:?}: give one of the two");
            return Err(ConfigError::flag("--optimizer", message).into());
        }
        if !OptimizerConfig::names().contains(&name.as_str()) {
            let names = OptimizerConfig::names().join(", ");
            return Err(ConfigError::flag(
                "--optimizer",
                format!("no optimizer is named {name:?}; it is one of {names}"),
            )
            .into());
        }
        base.with_optimizer(name)
    }
}

/// Runs one job to its end; a diverged run is no error here.
fn run_one(job: &Job, interrupt: &Interrupt) -> Result<Option<End>> {
    let mut how = None;
    let mut ended = |_: usize, end: End| {
        how = Some(end);
        Ok(())
    };
    let finish = run_all(std::slice::from_ref(job), 1, interrupt, &mut |_| Watch::Continue, &mut ended)?;
    match (finish, how) {
        (Finish::Interrupted, _) | (_, None) => Ok(None),
        (_, Some(End::Refused(why))) => Err(ConfigError::flag("the run", why).into()),
        (_, Some(End::Killed(how))) => bail!("the run was killed ({how}): perhaps memory ran out"),
        (_, Some(end)) => Ok(Some(end)),
    }
}
