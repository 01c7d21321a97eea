//! `vrtrain report`: runs as one page, as pictures, or as tables.

use super::Ending;
use crate::config::ConfigError;
use crate::report::page::{self, Source};
use crate::report::picture::{self, Form};
use crate::report::{RunReport, find, tables};
use anyhow::{Context, Result};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a report is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Html,
    Svg,
    Png,
    Markdown,
    Csv,
}

impl Format {
    fn extension(self) -> &'static str {
        match self {
            Self::Html => "html",
            Self::Svg => "svg",
            Self::Png => "png",
            Self::Markdown => "md",
            Self::Csv => "csv",
        }
    }
}

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub runs: Vec<PathBuf>,
    pub formats: Vec<Format>,
    /// One format: the file; several: its extension is replaced by each format's own.
    pub out: Option<PathBuf>,
}

/// Reads the runs and writes the report.
pub fn run(options: &Options) -> Result<Ending> {
    let found = find(&options.runs).map_err(|error| ConfigError::flag("RUN", format!("{error:#}")))?;
    if found.is_empty() {
        let places: Vec<String> = options.runs.iter().map(|path| path.display().to_string()).collect();
        return Err(ConfigError::flag("RUN", format!("there is no run in {}", places.join(", "))).into());
    }
    let runs = found.iter().map(RunReport::read).collect::<Result<Vec<_>>>()?;
    for run in runs.iter().filter(|run| run.rows.is_empty()) {
        eprintln!("{} has no step yet", run.description.name);
    }
    for format in &options.formats {
        let path = place(options, *format, found.len(), &found[0].path);
        match (format, &path) {
            (Format::Svg, Some(path)) => picture::draw(&runs, Form::Svg, path)?,
            (Format::Png, Some(path)) => picture::draw(&runs, Form::Png, path)?,
            (Format::Markdown, _) => write(path.as_deref(), &tables::markdown(&runs))?,
            (Format::Csv, _) => write(path.as_deref(), &tables::csv(&runs))?,
            (Format::Html, _) => write(path.as_deref(), &page::html(&runs, Source::File))?,
            (Format::Svg | Format::Png, None) => anyhow::bail!("a picture needs a file: give --out"),
        }
        if let Some(path) = path {
            eprintln!("wrote {}", path.display());
        }
    }
    Ok(Ending::Done)
}

/// The file of a format. Tables go to stdout unless a file is named; a page or a picture of one run goes into its folder,
/// of several runs into the working directory.
fn place(options: &Options, format: Format, runs: usize, first: &Path) -> Option<PathBuf> {
    match &options.out {
        Some(out) if options.formats.len() == 1 => Some(out.clone()),
        Some(out) => Some(out.with_extension(format.extension())),
        None if matches!(format, Format::Markdown | Format::Csv) => None,
        None => {
            let folder = if runs == 1 { first } else { Path::new("") };
            Some(folder.join("report").with_extension(format.extension()))
        }
    }
}

fn write(path: Option<&Path>, text: &str) -> Result<()> {
    match path {
        Some(path) => std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display())),
        None => std::io::stdout().write_all(text.as_bytes()).context("cannot write to stdout"),
    }
}
