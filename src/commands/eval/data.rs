//! Where a task's problems are: a file, a folder in the hub's layout, or a data set on the hub.

use crate::commands::setup::{self, LazyHub};
use crate::config::{ConfigError, Source};
use crate::data::{Record, records};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// A task's own data set.
pub struct Home {
    /// Its id on the hub.
    pub id: &'static str,
    /// Globs of the split's files in such a folder, tried in order.
    pub split: &'static [&'static str],
}

/// The rows of `--data`, by default of the task's data set on the hub.
pub fn problems(data: Option<&str>, files: &[String], home: &Home) -> Result<Vec<Record>> {
    rows(data.unwrap_or(home.id), files, home.split, "--data")
}

/// The rows of a file, or of the files that the first glob with a match finds in a folder or data set.
pub fn rows(data: &str, files: &[String], split: &[&str], flag: &'static str) -> Result<Vec<Record>> {
    let source = Source::parse(data, Path::new(""));
    if let Source::Path(path) = &source
        && !path.exists()
    {
        return Err(
            ConfigError::flag(flag, format!("there is no file, folder or hub data set (owner/name) {data}")).into()
        );
    }
    setup::refuse_idle_globs(&source, files)?;
    let hub = LazyHub::default();
    let sources = [source];
    let whole_file = matches!(&sources[0], Source::Path(path) if path.is_file());
    if whole_file || !files.is_empty() {
        return records(&setup::source_files(&sources, files, &hub, flag)?);
    }
    let mut last = None;
    for glob in split {
        match setup::source_files(&sources, &[(*glob).to_owned()], &hub, flag) {
            Ok(found) => return records(&found),
            Err(error) => last = Some(error),
        }
    }
    Err(last.context("the task names no files")?).context("choose files with --files GLOB")
}

/// The file beside `data` whose name has `train` in place of `test`.
pub fn training_twin(data: &Path) -> Option<PathBuf> {
    let name = data.file_name()?.to_str()?;
    let twin = data.with_file_name(name.replace("test", "train"));
    (twin != data && twin.is_file()).then_some(twin)
}
