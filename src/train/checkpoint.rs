//! Checkpoints: complete, verifiable, and never half-written.
//!
//! A checkpoint is a folder `checkpoints/step-00000100` with `model.safetensors` (weights under Hugging Face names),
//! `optimizer.safetensors` (flat state tensors in the layout's order), `state.json` and `manifest.json` (size and sha256
//! of the others). It is written under a temporary name, every file is flushed to the disk, the manifest comes last, and
//! a rename makes it visible. A folder whose manifest is missing or does not match is not a checkpoint.

use crate::data::Position;
use crate::model::weights::{self, NamePrefix};
use crate::optim::OptimizerState;
use crate::params::{Layout, on_cpu};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

pub const FORMAT: u32 = 1;
const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const MANIFEST: &str = "manifest.json";

/// Everything of a run at a step that is not a tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Version of this file's format.
    pub format: u32,
    /// Steps done.
    pub step: u64,
    /// Training tokens seen.
    pub tokens: u64,
    /// The schedule's horizon in steps.
    pub schedule_steps: u64,
    /// Seed of every random stream; a stream's place is a function of the step.
    pub seed: u64,
    /// Place of the next row of the training data.
    pub position: Position,
    pub optimizer: String,
    /// The optimizer's scalars, exact.
    pub optimizer_scalars: Vec<(String, f64)>,
    /// A step that is done but whose evaluation was interrupted: its record, to be completed on resume.
    pub pending: Option<super::Record>,
    /// Where the weights are adapters: the frozen base that they belong to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseRecord>,
    /// The checkpoint of the lowest validation loss so far, where that one is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
}

/// The frozen base of adapters: what to load, and how to know that it is still the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRecord {
    /// A hub id or a folder; `None`: drawn from `seed`.
    pub source: Option<String>,
    pub seed: Option<u64>,
    /// `nf4`, or `None`: as the files have it.
    pub quantize: Option<String>,
    /// Weight file -> sha256 in hexadecimal.
    pub sha256: BTreeMap<String, String>,
}

/// A checkpoint and its validation loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub val_loss: f64,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    format: u32,
    files: BTreeMap<String, FileRecord>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct FileRecord {
    bytes: u64,
    sha256: String,
}

/// The folder `checkpoints` of a run.
pub struct Checkpoints {
    root: PathBuf,
    folder: PathBuf,
}

/// Name of the checkpoint after `step` steps.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

impl Checkpoints {
    /// The checkpoints below a run folder.
    pub fn of_run(run: &Path) -> Self {
        Self { root: run.to_owned(), folder: run.join("checkpoints") }
    }

    /// Steps of all checkpoint folders, valid or not, newest first.
    fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("cannot list {}", self.folder.display())),
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.with_context(|| format!("cannot list {}", self.folder.display()))?.file_name();
            steps.extend(
                name.to_str().and_then(|name| name.strip_prefix("step-")).and_then(|step| step.parse::<u64>().ok()),
            );
        }
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// The newest checkpoint whose files match its manifest, and what is wrong with newer ones.
    pub fn newest_valid(&self) -> Result<(Option<PathBuf>, Vec<String>)> {
        let mut rejected = Vec::new();
        for step in self.steps()? {
            let path = self.folder.join(folder_name(step));
            match verify(&path) {
                Ok(()) => return Ok((Some(path), rejected)),
                Err(error) => rejected.push(format!("{}: {error:#}", path.display())),
            }
        }
        Ok((None, rejected))
    }

    /// Whether there is a valid checkpoint of `step`.
    pub fn has(&self, step: u64) -> bool {
        verify(&self.folder.join(folder_name(step))).is_ok()
    }

    /// Writes a checkpoint, points `latest` to it and `best` to the best one, and removes all others but the newest
    /// `keep_last`.
    ///
    /// # Errors
    /// When a weight or a number of the optimizer's state is not finite, or the disk refuses; older checkpoints are then
    /// untouched and nothing half-written stays.
    pub fn write(
        &self,
        layout: &Layout,
        flat_weights: &Tensor,
        optimizer: &OptimizerState,
        state: &State,
        keep_last: usize,
    ) -> Result<PathBuf> {
        check_finite(layout, flat_weights, optimizer).with_context(|| {
            format!(
                "step {} has spoilt the run, so no checkpoint of it is written and the last one stands (a lower \
                 optimizer.lr, more warm-up or a tighter train.grad_clip may help)",
                state.step
            )
        })?;
        fs::create_dir_all(&self.folder).with_context(|| format!("cannot create {}", self.folder.display()))?;
        let name = folder_name(state.step);
        let temporary = self.folder.join(format!(".{name}.{}.tmp", std::process::id()));
        let target = self.folder.join(&name);
        let written = write_files(&temporary, layout, flat_weights, optimizer, state).and_then(|()| {
            // There may be one of the same step: not valid, or without a record that its run owed. It goes aside first,
            // for removing it takes long and a process may be killed at any moment.
            let aside = self.folder.join(format!(".{name}.{}.before.tmp", std::process::id()));
            if target.exists() {
                fs::rename(&target, &aside)?;
            }
            fs::rename(&temporary, &target)?;
            sync_folder(&self.folder)?;
            if aside.exists() {
                fs::remove_dir_all(&aside)?;
            }
            Ok(())
        });
        if let Err(error) = written {
            let _ = fs::remove_dir_all(&temporary);
            return Err(error).with_context(|| format!("cannot write the checkpoint {}", target.display()));
        }
        self.settle(state.step, state.best.map(|best| best.step), keep_last)?;
        Ok(target)
    }

    /// Points `latest` to the checkpoint of `step` (0 is none) and `best` to the best one, and removes all older ones but
    /// the newest `keep_last` and the best, and leftovers of processes that died while writing.
    ///
    /// A process that was killed right after a checkpoint became visible has not come to this, so every run begins with
    /// it. Where all is as it should be, nothing is written.
    pub fn settle(&self, step: u64, best: Option<u64>, keep_last: usize) -> Result<()> {
        self.point("latest", (step > 0).then_some(step))?;
        self.point("best", best)?;
        // A newer one was passed over, for it is not valid: it must not push one out that is.
        let known = self.steps()?.into_iter().filter(|other| *other <= step);
        for old in known.skip(keep_last.max(1)).filter(|old| Some(*old) != best) {
            let path = self.folder.join(folder_name(old));
            // The manifest goes first: what is left of an interrupted removal is no checkpoint.
            let _ = fs::remove_file(path.join(MANIFEST));
            fs::remove_dir_all(&path)
                .with_context(|| format!("cannot remove the old checkpoint {}", path.display()))?;
        }
        self.remove_leftovers()
    }

    /// Makes the file `name` of the run name the checkpoint of `step`, or none.
    fn point(&self, name: &str, step: Option<u64>) -> Result<()> {
        let path = self.root.join(name);
        let wanted = step.map(|step| format!("{}\n", folder_name(step)));
        match (wanted, fs::read(&path).ok()) {
            (Some(wanted), found) if found.as_deref() != Some(wanted.as_bytes()) => {
                replace_file(&path, wanted.as_bytes())
            }
            (None, Some(_)) => fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display())),
            _ => Ok(()),
        }
    }

    /// Removes temporary folders that a killed process left.
    fn remove_leftovers(&self) -> Result<()> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Ok(()) };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with(".step-") && name.ends_with(".tmp")) {
                let path = entry.path();
                fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// Refuses weights and states that a resumed run would refuse, while older checkpoints are still there.
fn check_finite(layout: &Layout, flat_weights: &Tensor, optimizer: &OptimizerState) -> Result<()> {
    let check = |what: &str, numbers: &[f32]| -> Result<()> {
        // A pass over everything first: looking parameter by parameter is for the message.
        if numbers.par_iter().all(|number| number.is_finite()) {
            return Ok(());
        }
        if numbers.len() == layout.len() {
            for parameter in layout.parameters() {
                let own = &numbers[parameter.range()];
                if let Some(index) = own.iter().position(|number| !number.is_finite()) {
                    bail!("{what} of {} is {} at element {index}", parameter.name, own[index]);
                }
            }
        }
        bail!("{what} holds a number that is not finite")
    };
    on_cpu(flat_weights, |numbers| check("the weight", numbers))??;
    for (name, tensor) in &optimizer.tensors {
        let flat = tensor.flatten_all()?;
        on_cpu(&flat, |numbers| check(&format!("the optimizer's {name}"), numbers))??;
    }
    for (name, value) in &optimizer.scalars {
        ensure!(value.is_finite(), "the optimizer's {name} is {value}");
    }
    Ok(())
}

fn write_files(
    folder: &Path,
    layout: &Layout,
    flat_weights: &Tensor,
    optimizer: &OptimizerState,
    state: &State,
) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir(folder)?;
    on_cpu(flat_weights, |numbers| weights::write(&folder.join(weights::SINGLE), layout, numbers, NamePrefix::None))??;
    write_optimizer(&folder.join(OPTIMIZER), optimizer)?;
    fs::write(folder.join(STATE), serde_json::to_vec_pretty(state)?)?;
    let mut files = BTreeMap::new();
    for name in [weights::SINGLE, OPTIMIZER, STATE] {
        let path = folder.join(name);
        File::open(&path)?.sync_all()?;
        files.insert(name.to_owned(), record(&path)?);
    }
    let manifest = folder.join(MANIFEST);
    fs::write(&manifest, serde_json::to_vec_pretty(&Manifest { format: FORMAT, files })?)?;
    File::open(&manifest)?.sync_all()?;
    sync_folder(folder)
}

/// Writes the state tensors; one at a time is copied to the host.
fn write_optimizer(path: &Path, optimizer: &OptimizerState) -> Result<()> {
    let tensors = optimizer.tensors.iter().map(|(name, tensor)| (name, tensor));
    safetensors::serialize_to_file(tensors, None, path).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a checkpoint that [`verify`] accepts.
pub fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let state: State =
        serde_json::from_str(&text).with_context(|| format!("{} is not a state file", path.display()))?;
    ensure!(state.format == FORMAT, "{} has format {}, this vrtrain reads {FORMAT}", path.display(), state.format);
    Ok(state)
}

/// The optimizer's state of a checkpoint.
pub fn read_optimizer(folder: &Path, state: &State) -> Result<OptimizerState> {
    let mut tensors = Vec::new();
    for (name, place) in weights::headers(&[folder.join(OPTIMIZER)])? {
        let mut numbers = vec![0f32; place.shape.iter().product()];
        weights::read(&name, &place, &mut numbers)?;
        tensors.push((name, Tensor::from_vec(numbers, place.shape.clone(), &Device::Cpu)?));
    }
    Ok(OptimizerState { tensors, scalars: state.optimizer_scalars.clone() })
}

/// Fills `numbers` (a flat storage of `layout`) with the weights of a checkpoint.
pub fn read_weights(folder: &Path, layout: &Layout, numbers: &mut [f32]) -> Result<()> {
    weights::load(layout, &weights::headers(&[folder.join(weights::SINGLE)])?, numbers)
}

/// Checks that every file of a checkpoint is there with the size and sha256 of its manifest.
pub fn verify(folder: &Path) -> Result<()> {
    let path = folder.join(MANIFEST);
    let text = fs::read_to_string(&path).context("it has no readable manifest.json (it was never finished)")?;
    let manifest: Manifest = serde_json::from_str(&text).context("manifest.json is torn")?;
    ensure!(manifest.format == FORMAT, "its manifest has format {}, this vrtrain reads {FORMAT}", manifest.format);
    for name in [weights::SINGLE, OPTIMIZER, STATE] {
        let Some(expected) = manifest.files.get(name) else { bail!("manifest.json does not name {name}") };
        let found = record(&folder.join(name)).with_context(|| format!("cannot read {name}"))?;
        ensure!(found == *expected, "{name} is not what the manifest says: {found:?}, expected {expected:?}");
    }
    Ok(())
}

/// A file's sha256 in hexadecimal.
pub fn sha256_of(path: &Path) -> Result<String> {
    Ok(record(path)?.sha256)
}

fn record(path: &Path) -> Result<FileRecord> {
    let mut file = File::open(path)?;
    let (mut hasher, mut bytes, mut buffer) = (Sha256::new(), 0u64, vec![0u8; 1 << 20]);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            let digest = hasher.finalize();
            let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            return Ok(FileRecord { bytes, sha256 });
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    // Windows cannot open a folder as a file; there the rename alone must do.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Replaces a small file in one step: readers see the old text or the new one.
pub fn replace_file(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || -> Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        std::io::Write::write_all(&mut file, content)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        sync_folder(folder)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::ParameterSpec;

    #[test]
    fn what_a_killed_process_did_not_come_to_is_made_good_and_a_torn_checkpoint_pushes_no_valid_one_out() -> Result<()>
    {
        let run = tempfile::tempdir()?;
        let checkpoints = Checkpoints::of_run(run.path());
        for name in ["step-00000002", "step-00000004", "step-00000006", "step-00000008", ".step-00000008.7.tmp"] {
            fs::create_dir_all(run.path().join("checkpoints").join(name))?;
        }
        fs::write(run.path().join("latest"), "step-00000004\n")?;
        let state = || -> Result<(Vec<u64>, String, Option<String>)> {
            let text = |name: &str| fs::read_to_string(run.path().join(name));
            Ok((checkpoints.steps()?, text("latest")?, text("best").ok()))
        };
        let latest = || "step-00000006\n".to_owned();
        checkpoints.settle(6, Some(2), 1)?;
        assert_eq!(state()?, (vec![8, 6, 2], latest(), Some("step-00000002\n".to_owned())));
        assert!(!run.path().join("checkpoints/.step-00000008.7.tmp").exists());
        checkpoints.settle(6, None, 1)?;
        assert_eq!(state()?, (vec![8, 6], latest(), None));
        // Nothing is written where nothing is wrong.
        let written = fs::metadata(run.path().join("latest"))?.modified()?;
        checkpoints.settle(6, None, 1)?;
        assert_eq!(fs::metadata(run.path().join("latest"))?.modified()?, written);
        // A run that begins anew, for no checkpoint was valid.
        fs::write(run.path().join("best"), "step-00000002\n")?;
        fs::create_dir_all(run.path().join("checkpoints/.step-00000002.7.tmp"))?;
        checkpoints.settle(0, None, 1)?;
        let gone = ["latest", "best", "checkpoints/.step-00000002.7.tmp"];
        assert!(gone.iter().all(|name| !run.path().join(name).exists()));
        assert_eq!(checkpoints.steps()?, [8, 6]);
        Ok(())
    }

    #[test]
    fn weights_and_states_that_are_not_finite_are_refused_by_name_before_they_are_saved() -> Result<()> {
        let spec = |name: &str| ParameterSpec { name: name.into(), shape: vec![4], decays: true };
        let layout = Layout::new(vec![spec("first"), spec("second")]);
        let flat = |value: f32| -> Result<Tensor> {
            let mut numbers = vec![0.5; layout.len()];
            numbers[layout.parameters()[1].offset + 2] = value;
            Ok(Tensor::from_vec(numbers, layout.len(), &Device::Cpu)?)
        };
        let state = |value: f32, scalar: f64| -> Result<OptimizerState> {
            Ok(OptimizerState {
                tensors: vec![("velocity".into(), flat(value)?)],
                scalars: vec![("norm".into(), scalar)],
            })
        };
        let refusal = |weight: f32, state: OptimizerState| -> Result<String> {
            Ok(check_finite(&layout, &flat(weight)?, &state).map_or_else(|error| error.to_string(), |()| String::new()))
        };
        assert_eq!(refusal(1.0, state(1.0, 2.0)?)?, "");
        assert_eq!(refusal(f32::INFINITY, state(1.0, 2.0)?)?, "the weight of second is inf at element 2");
        assert_eq!(refusal(1.0, state(f32::NAN, 2.0)?)?, "the optimizer's velocity of second is NaN at element 2");
        assert_eq!(refusal(1.0, state(1.0, f64::NAN)?)?, "the optimizer's norm is NaN");
        Ok(())
    }
}
