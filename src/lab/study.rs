//! A study: a search space, a budget, and the trials made so far, as JSON lines that survive a kill.

use super::space::Dimension;
use super::statistics::median;
use super::tpe::{Seen, suggest};
use crate::train::checkpoint::replace_file;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What makes two studies the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub optimizer: String,
    pub space: Vec<Dimension>,
    /// Values of the base config, the first trial.
    pub base: Vec<f64>,
    /// SHA-256 of the resolved base config.
    pub config_sha256: String,
    pub seed: u64,
    /// Trials of the quasi-random start.
    pub startup: usize,
    /// Trials that are made side by side before the next are chosen.
    pub round: usize,
    pub early_stop: EarlyStop,
}

pub const FORMAT: u32 = 1;

/// When a trial is given up before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EarlyStop {
    None,
    /// When its validation loss is above the median of finished trials at the same step.
    Median,
}

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Finished,
    /// Given up early; its objective is the loss at that step.
    Stopped,
    /// No loss: it diverged.
    Failed,
}

/// One trial, as a line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    pub trial: usize,
    pub values: Vec<f64>,
    pub status: Status,
    pub objective: Option<f64>,
    /// The validation losses: (step, loss).
    pub course: Vec<(u64, f64)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A study with its file.
pub struct Study {
    pub header: Header,
    pub trials: Vec<Trial>,
    path: PathBuf,
}

/// Finished trials that the median rule wants before it stops any.
const MEDIAN_NEEDS: usize = 3;

impl Study {
    /// Takes a study up, or begins it. A last line without an end was torn by a kill: it is dropped, and said to be.
    ///
    /// # Errors
    /// When the file is of another study: the message lists what differs; when a line is no trial of this study.
    pub fn open(path: &Path, header: Header) -> Result<Self> {
        let mut study = Self { header, trials: Vec::new(), path: path.to_owned() };
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let line = serde_json::to_string(&study.header)? + "\n";
                replace_file(path, line.as_bytes())?;
                return Ok(study);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let mut lines = text.split_inclusive(|byte| *byte == b'\n');
        let first = lines.next().unwrap_or_default();
        let found: Header = serde_json::from_slice(first)
            .with_context(|| format!("{}:1: this is not a study's head; give another --out", path.display()))?;
        study.refuse_other(&found)?;
        let mut kept = first.to_vec();
        if !first.ends_with(b"\n") {
            kept.push(b'\n');
            eprintln!("{}:1: the head's line had no end: it gets one", path.display());
        }
        for (index, line) in lines.enumerate() {
            let place = format!("{}:{}", path.display(), index + 2);
            // Only the last line of a file can lack its end.
            if !line.ends_with(b"\n") {
                eprintln!("{place}: torn by a kill: the line is dropped, and the trial is made again");
                break;
            }
            let trial: Trial =
                serde_json::from_slice(line).map_err(|error| anyhow::anyhow!("{place}: not a trial: {error}"))?;
            study.check(&trial).map_err(|why| anyhow::anyhow!("{place}: {why}"))?;
            kept.extend_from_slice(line);
            study.trials.push(trial);
        }
        if kept != text {
            replace_file(path, &kept)?;
        }
        Ok(study)
    }

    /// Whether `trial` can be the next one.
    fn check(&self, trial: &Trial) -> Result<(), String> {
        let Trial { trial: number, values, status, objective, .. } = trial;
        if *number != self.trials.len() {
            return Err(format!("trial {number} is out of turn"));
        }
        let space = &self.header.space;
        if values.len() != space.len() {
            return Err(format!("trial {number} has {} values, and the study {} keys", values.len(), space.len()));
        }
        if let Some((dimension, value)) = space.iter().zip(values).find(|(dimension, value)| !dimension.takes(**value))
        {
            return Err(format!("trial {number} has {} = {value}, which its range does not have", dimension.key));
        }
        match (status, objective) {
            (Status::Failed, Some(_)) => Err(format!("trial {number} failed and has an objective")),
            (Status::Finished | Status::Stopped, None) => Err(format!("trial {number} has no objective")),
            _ => Ok(()),
        }
    }

    fn refuse_other(&self, found: &Header) -> Result<()> {
        let show = |header: &Header| -> Result<Vec<(String, String)>> {
            let value = serde_json::to_value(header)?;
            let entries = value.as_object().into_iter().flatten();
            Ok(entries.map(|(key, value)| (key.clone(), value.to_string())).collect())
        };
        let (old, new) = (show(found)?, show(&self.header)?);
        let pairs = old.iter().zip(&new).filter(|(old, new)| old != new);
        let list: Vec<String> = pairs.map(|((key, old), (_, new))| format!("{key} was {old} and is {new}")).collect();
        if list.is_empty() {
            return Ok(());
        }
        let message =
            format!("it holds another study: {}; give another --out, or the settings of that study", list.join("; "));
        Err(crate::config::ConfigError::flag(&self.path.display().to_string(), message).into())
    }

    /// The values of a trial: the base config first, then what the estimator suggests from the trials of earlier rounds.
    pub fn values(&self, trial: usize) -> Vec<f64> {
        if trial == 0 {
            return self.header.base.clone();
        }
        let begin = self.round_begin(trial);
        let space = &self.header.space;
        let place = |values: &[f64]| space.iter().zip(values).map(|(d, value)| d.place(*value)).collect::<Vec<_>>();
        let known = self.trials.iter().take(begin);
        let seen: Vec<Seen> =
            known.map(|trial| Seen { place: place(&trial.values), objective: trial.objective }).collect();
        let pending: Vec<Vec<f64>> = (begin..trial).map(|other| place(&self.values(other))).collect();
        let next = suggest(space.len(), trial - 1, self.header.startup, &seen, &pending, self.header.seed);
        space.iter().zip(next).map(|(dimension, place)| dimension.value(place)).collect()
    }

    /// First trial of the round that `trial` belongs to. What a round's trials are chosen from is fixed when it begins,
    /// so that a study taken up goes on as it would have.
    pub fn round_begin(&self, trial: usize) -> usize {
        if trial == 0 { 0 } else { 1 + (trial - 1) / self.header.round * self.header.round }
    }

    /// The trials from `trial` to the end of its round; the first of all is alone.
    pub fn round(&self, trial: usize, budget: usize) -> std::ops::Range<usize> {
        let end = if trial == 0 { 1 } else { 1 + ((trial - 1) / self.header.round + 1) * self.header.round };
        trial..end.min(budget)
    }

    /// Where a trial is to be given up: the first place of its course above the median of earlier rounds' finished
    /// trials at the same step.
    pub fn stops_at(&self, begin: usize, course: &[(u64, f64)]) -> Option<usize> {
        if self.header.early_stop == EarlyStop::None {
            return None;
        }
        let finished: Vec<&Trial> =
            self.trials.iter().take(begin).filter(|trial| trial.status == Status::Finished).collect();
        if finished.len() < MEDIAN_NEEDS {
            return None;
        }
        course.iter().position(|(step, loss)| {
            let at = |trial: &&Trial| trial.course.iter().find(|(other, _)| other == step).map(|(_, loss)| *loss);
            let others: Vec<f64> = finished.iter().filter_map(at).collect();
            others.len() >= MEDIAN_NEEDS && median(&others).is_some_and(|median| *loss > median)
        })
    }

    /// Appends the next trial.
    pub fn push(&mut self, trial: Trial) -> Result<()> {
        let mut line = serde_json::to_vec(&trial)?;
        line.push(b'\n');
        let write = || -> std::io::Result<()> {
            let mut file = File::options().append(true).open(&self.path)?;
            file.write_all(&line)?;
            file.sync_data()
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))?;
        self.trials.push(trial);
        Ok(())
    }

    /// The best trial that ran to its end.
    pub fn best(&self) -> Option<&Trial> {
        let finished = self.trials.iter().filter(|trial| trial.status == Status::Finished);
        let value = |trial: &Trial| trial.objective.unwrap_or(f64::INFINITY);
        finished.min_by(|a, b| value(a).total_cmp(&value(b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Result<Header> {
        let space = vec![Dimension::parse("optimizer.lr=1e-4..1:log").map_err(anyhow::Error::msg)?];
        Ok(Header {
            format: FORMAT,
            optimizer: "adamw".into(),
            space,
            base: vec![1e-3],
            config_sha256: "x".into(),
            seed: 4,
            startup: 3,
            round: 2,
            early_stop: EarlyStop::Median,
        })
    }

    fn trial(number: usize, values: Vec<f64>, losses: &[f64]) -> Trial {
        let course: Vec<(u64, f64)> = losses.iter().enumerate().map(|(i, loss)| (10 * (i as u64 + 1), *loss)).collect();
        let objective = losses.last().copied();
        Trial { trial: number, values, status: Status::Finished, objective, course, error: None }
    }

    #[test]
    fn a_study_killed_in_the_middle_goes_on_with_the_same_trials() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("study.jsonl");
        let run = |study: &mut Study, until: usize| -> Result<()> {
            while study.trials.len() < until {
                let number = study.trials.len();
                let values = study.values(number);
                let loss = (values[0].log10() + 2.0).abs();
                study.push(trial(number, values, &[loss + 1.0, loss]))?;
            }
            Ok(())
        };
        let mut whole = Study::open(&path, header()?)?;
        run(&mut whole, 12)?;
        let other = folder.path().join("other.jsonl");
        let mut cut = Study::open(&other, header()?)?;
        run(&mut cut, 6)?;
        // Killed while it wrote a line.
        let mut text = std::fs::read_to_string(&other)?;
        text.push_str("{\"trial\":6,\"val");
        std::fs::write(&other, text)?;
        let mut resumed = Study::open(&other, header()?)?;
        assert_eq!(resumed.trials.len(), 6);
        run(&mut resumed, 12)?;
        assert_eq!(resumed.trials, whole.trials);
        assert_eq!(std::fs::read(&path)?, std::fs::read(&other)?);
        assert_eq!(whole.trials[0].values, [1e-3]);
        assert!(whole.best().and_then(|trial| trial.objective).is_some_and(|loss| loss < 0.5));
        Ok(())
    }

    #[test]
    fn a_file_of_another_study_is_refused_with_the_difference() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("study.jsonl");
        Study::open(&path, header()?)?;
        let space = vec![Dimension::parse("optimizer.lr=1e-5..1:log").map_err(anyhow::Error::msg)?];
        let Err(error) = Study::open(&path, Header { space, ..header()? }) else { panic!("another space") };
        assert!(error.to_string().contains("space was") && error.to_string().contains("0.00001"), "{error}");
        std::fs::write(&path, "no study\n")?;
        assert!(Study::open(&path, header()?).is_err());
        Ok(())
    }

    #[test]
    fn damaged_trials_are_refused_by_line_and_lines_without_an_end_are_made_again() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("study.jsonl");
        let mut study = Study::open(&path, header()?)?;
        study.push(trial(0, vec![1e-3], &[2.0]))?;
        study.push(trial(1, vec![1e-2], &[1.0]))?;
        let text = std::fs::read_to_string(&path)?;
        for (from, to, word) in [
            ("[0.01]", "[]", "trial 1 has 0 values, and the study 1 keys"),
            ("[0.01]", "[0.01,0.1]", "trial 1 has 2 values"),
            ("[0.01]", "[7.5]", "optimizer.lr = 7.5"),
            ("\"objective\":1.0", "\"objective\":null", "no objective"),
            ("\"trial\":1,", "\"trial\":one,", "not a trial"),
        ] {
            let damaged = text.replacen(from, to, 1);
            std::fs::write(&path, &damaged)?;
            let Err(error) = Study::open(&path, header()?) else { panic!("{word}") };
            let message = format!("{error:#}");
            assert!(message.contains("study.jsonl:3: ") && message.contains(word), "{message}");
            assert_eq!(std::fs::read_to_string(&path)?, damaged);
        }
        // Torn in the middle of a character.
        std::fs::write(&path, [text.as_bytes(), b"{\"trial\":2,\"error\":\"\xc2"].concat())?;
        assert_eq!(Study::open(&path, header()?)?.trials.len(), 2);
        assert_eq!(std::fs::read_to_string(&path)?, text);
        let head = text.lines().next().context("a head")?;
        std::fs::write(&path, head)?;
        Study::open(&path, header()?)?.push(trial(0, vec![1e-3], &[2.0]))?;
        assert_eq!(Study::open(&path, header()?)?.trials.len(), 1);
        Ok(())
    }

    #[test]
    fn the_median_of_finished_trials_stops_a_worse_one() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut study = Study::open(&folder.path().join("s"), header()?)?;
        for (number, loss) in [3.0, 2.0, 1.0].into_iter().enumerate() {
            assert_eq!(study.stops_at(number, &[(10, 9.0)]), None);
            study.push(trial(number, vec![1e-3], &[loss + 1.0, loss]))?;
        }
        assert_eq!(study.stops_at(3, &[(10, 2.5), (20, 2.5)]), Some(1));
        assert_eq!(study.stops_at(3, &[(10, 2.5), (20, 1.5)]), None);
        assert_eq!(study.stops_at(2, &[(10, 9.0)]), None);
        assert_eq!(study.stops_at(3, &[(7, 9.0)]), None);
        assert_eq!(
            (study.round(0, 9), study.round(1, 9), study.round(4, 9), study.round(5, 6)),
            (0..1, 1..3, 4..5, 5..6)
        );
        Ok(())
    }
}
