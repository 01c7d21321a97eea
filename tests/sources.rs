//! The sources keep their shape: directions of the modules, sizes of files, crates that one module alone may name.

use std::path::{Path, PathBuf};

fn sources() -> Vec<(String, String)> {
    fn collect(folder: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a source folder").flatten() {
            let path = entry.path();
            if path.is_dir() { collect(&path, out) } else { out.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches"] {
        collect(&root.join(folder), &mut files);
    }
    files.sort();
    let rust = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    rust.map(|path| {
        let name = path.strip_prefix(root).expect("below the root").to_string_lossy().replace('\\', "/");
        (name, std::fs::read_to_string(&path).expect("readable"))
    })
    .collect()
}

#[test]
fn every_file_says_its_purpose_and_none_is_too_long() {
    for (name, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= 600, "{name} has {lines} lines");
        let purpose = text.lines().find(|line| !line.starts_with("#!["));
        assert!(purpose.is_some_and(|line| line.starts_with("//!")), "{name} does not begin with its purpose");
    }
}

#[test]
fn modules_depend_in_one_direction() {
    // What each module of src/ must not use.
    let forbidden: &[(&str, &[&str])] = &[
        ("config", &["params", "ops", "data", "model", "optim", "hub", "train", "eval", "generate", "commands", "cli"]),
        (
            "cuda",
            &[
                "config", "params", "ops", "data", "model", "optim", "hub", "train", "eval", "generate", "commands",
                "cli",
            ],
        ),
        ("params", &["ops", "data", "model", "optim", "hub", "train", "eval", "generate", "commands", "cli"]),
        ("ops", &["data", "model", "optim", "hub", "train", "eval", "generate", "commands", "cli"]),
        ("data", &["params", "ops", "model", "optim", "hub", "train", "eval", "generate", "commands", "cli"]),
        ("hub", &["params", "ops", "data", "model", "optim", "train", "eval", "generate", "commands", "cli"]),
        ("model", &["data", "optim", "hub", "train", "eval", "generate", "commands", "cli"]),
        ("optim", &["data", "model", "hub", "train", "eval", "generate", "commands", "cli"]),
        ("train", &["hub", "commands", "cli"]),
        (
            "report",
            &["params", "ops", "data", "model", "optim", "hub", "eval", "generate", "quickstart", "commands", "cli"],
        ),
        ("eval", &["data", "hub", "commands", "cli"]),
        ("generate", &["data", "hub", "commands", "cli"]),
        ("commands", &["cli"]),
    ];
    for (name, text) in sources() {
        let Some(inside) = name.strip_prefix("src/") else { continue };
        let module = inside.split(['/', '.']).next().unwrap_or("");
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let code = code.collect::<Vec<_>>().join("\n");
        for (_, others) in forbidden.iter().filter(|(of, _)| *of == module) {
            for other in *others {
                assert!(!code.contains(&format!("crate::{other}::")), "{name} uses crate::{other}");
            }
        }
    }
}

#[test]
fn some_crates_are_known_in_one_place() {
    for (krate, place) in [
        ("clap", "src/cli"),
        ("indicatif", "src/train/progress.rs"),
        ("parquet", "src/data/"),
        ("axum", "src/report/server.rs"),
        ("tokio", "src/report/server.rs"),
        ("reqwest", "src/hub/"),
    ] {
        for (name, text) in sources().into_iter().filter(|(name, _)| name.starts_with("src/")) {
            let uses = text.contains(&format!("use {krate}::")) || text.contains(&format!(" {krate}::"));
            assert!(!uses || name.starts_with(place), "{name} uses {krate}");
        }
    }
    for (name, text) in sources() {
        let free = ["src/data/", "src/config/"].iter().any(|folder| name.starts_with(folder));
        assert!(!free || !text.contains("candle"), "{name} knows candle");
    }
}
