//! Finding runs: a run folder itself, or a folder with run folders somewhere below it.

use crate::train::is_run;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// A run folder and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub path: PathBuf,
    /// The folder's name; the whole path as given where several runs have the same name.
    pub name: String,
}

/// Folders of runs are not looked for deeper than this.
const DEPTH: usize = 4;

/// The runs that `paths` name, each once, those of a folder in the order of their names. A folder may hold none yet.
///
/// # Errors
/// When a path does not exist or is not a folder.
pub fn find(paths: &[PathBuf]) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for path in paths {
        ensure!(path.exists(), "there is no run and no folder {}", path.display());
        ensure!(path.is_dir(), "{} is a file: give a run folder or a folder of runs", path.display());
        collect(path, DEPTH, &mut found)?;
    }
    let mut runs: Vec<PathBuf> = Vec::new();
    for path in found {
        if !runs.contains(&path) {
            runs.push(path);
        }
    }
    let own_name = |path: &Path| {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        absolute.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
    };
    let names: Vec<String> = runs.iter().map(|path| own_name(path)).collect();
    let unique = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
    let shown = |(path, name): (PathBuf, &String)| {
        let name = if unique(name) { name.clone() } else { path.display().to_string() };
        Found { path, name }
    };
    Ok(runs.into_iter().zip(&names).map(shown).collect())
}

fn collect(folder: &Path, depth: usize, out: &mut Vec<PathBuf>) -> Result<()> {
    if is_run(folder) {
        out.push(folder.to_owned());
        return Ok(());
    }
    if depth == 0 {
        return Ok(());
    }
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        // Links are not followed: they may lead in circles.
        if !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            folders.push(entry.path());
        }
    }
    folders.sort_by_cached_key(|path| natural_key(&path.to_string_lossy()));
    folders.iter().try_for_each(|folder| collect(folder, depth - 1, out))
}

/// Orders run-2 before run-10: digits count as numbers.
fn natural_key(text: &str) -> Vec<(String, u64)> {
    let mut key = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (word, after) = rest.split_at(letters);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        key.push((word.to_owned(), number.parse().unwrap_or(u64::MAX)));
        rest = after;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_once_each_in_natural_order_and_named_apart() -> Result<()> {
        let base = tempfile::tempdir()?;
        for run in ["runs/small-10", "runs/small-2", "study/a/seed-1", "study/b/seed-1"] {
            std::fs::create_dir_all(base.path().join(run).join("checkpoints/step-1"))?;
            std::fs::write(base.path().join(run).join("config.toml"), "seed = 1\n")?;
        }
        let names = |paths: &[&str]| -> Result<Vec<String>> {
            let paths: Vec<PathBuf> = paths.iter().map(|path| base.path().join(path)).collect();
            Ok(find(&paths)?.into_iter().map(|found| found.name).collect())
        };
        assert_eq!(names(&["runs", "runs/small-2"])?, ["small-2", "small-10"]);
        assert_eq!(names(&["runs/small-10", "runs"])?, ["small-10", "small-2"]);
        let study = names(&["study"])?;
        assert!(study[0].ends_with("study/a/seed-1") && study[1].ends_with("study/b/seed-1"), "{study:?}");
        assert!(find(&[base.path().join("nothing")]).is_err());
        assert!(find(&[base.path().join("runs/small-2/config.toml")]).is_err());
        Ok(())
    }
}
