//! Exported folders in transformers itself. Needs an interpreter with torch and transformers in VRTRAIN_PYTHON.

mod common;

use common::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use vrtrain::model::{Decoder, ModelShape, weights};
use vrtrain::params::Layout;

/// Logits [time, vocabulary] of a folder by vrtrain.
fn our_logits(folder: &Path, ids: &[u32]) -> anyhow::Result<Vec<f32>> {
    let config = serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?;
    let shape = ModelShape::from_hugging_face(&config).map_err(anyhow::Error::msg)?;
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let mut numbers = vec![0.0; layout.len()];
    shape.load(&layout, &weights::files_of_folder(folder)?, &mut numbers)?;
    Decoder::new(&shape, &layout).logits(&numbers, ids, 1)
}

/// The largest difference between transformers' logits of `folder` and ours.
fn difference(python: &str, folder: &Path, ids: &[u32]) -> anyhow::Result<f32> {
    let out = tempfile::NamedTempFile::new()?;
    let list = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/logits.py");
    let output =
        Command::new(python).arg(script).arg(folder).arg(list).arg(out.path()).env("HF_HUB_OFFLINE", "1").output()?;
    anyhow::ensure!(output.status.success(), "{}", stderr(&output));
    let theirs = std::fs::read(out.path())?;
    let theirs: Vec<f32> = theirs.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let ours = our_logits(folder, ids)?;
    anyhow::ensure!(ours.len() == theirs.len(), "{} logits, transformers has {}", ours.len(), theirs.len());
    Ok(ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max))
}

#[test]
fn transformers_loads_exports_tied_and_untied_and_gives_the_same_logits() -> anyhow::Result<()> {
    let Ok(python) = std::env::var("VRTRAIN_PYTHON") else {
        eprintln!("skipping transformers_loads_exports_...: VRTRAIN_PYTHON is not set");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let config = small_config(folder.path(), 6, 0);
    let untied = format!(
        "model = {{ init = '{}' }}\ndata = {{ source = '{}', shuffle = false }}\noptimizer = {{ name = 'vradam' }}\n\
         train = {{ steps = 2, sequence_length = 11, micro_batch = 2 }}\n",
        fixture("gpt-nano-sort").display(),
        folder.path().join("sort.bin").display()
    );
    std::fs::write(folder.path().join("untied.toml"), untied)?;
    let tokens: Vec<u8> = (0..400u32).flat_map(|i| ((i * i / 3 % 3) as u16).to_le_bytes()).collect();
    std::fs::write(folder.path().join("sort.bin"), tokens)?;
    let llama = |name: &str, keys: &str| -> anyhow::Result<PathBuf> {
        let text = std::fs::read_to_string(&config)?.replace("arch = \"gpt2\"", &format!("arch = \"llama\"\n{keys}"));
        let path = folder.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    };
    let grouped = llama("grouped.toml", "n_kv_head = 1\nrope_theta = 500.0\nn_inner = 70")?;
    let tied_llama = llama("tied-llama.toml", "tie_word_embeddings = true\nrms_norm_epsilon = 1e-6")?;
    let ids = vec![5, 200, 17, 99, 3, 64, 255, 0];
    for (name, config, ids) in [
        ("tied", config, ids.clone()),
        ("untied", folder.path().join("untied.toml"), vec![0, 2, 1, 1, 0, 2, 2]),
        ("grouped-llama", grouped, ids.clone()),
        ("tied-llama", tied_llama, ids),
    ] {
        let (run, out) = (folder.path().join(format!("{name}-run")), folder.path().join(name));
        succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(&run));
        succeed(vrtrain().arg("export").arg(&run).arg("--out").arg(&out));
        let difference = difference(&python, &out, &ids)?;
        assert!(difference < 1e-4, "{name}: {difference}");
    }
    Ok(())
}

#[test]
fn folders_that_transformers_saved_give_its_logits() -> anyhow::Result<()> {
    let Ok(python) = std::env::var("VRTRAIN_PYTHON") else {
        eprintln!("skipping folders_that_transformers_saved_...: VRTRAIN_PYTHON is not set");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/random_llama.py");
    // Longer than the rotation's original context.
    let ids: Vec<u32> = (0..150u32).map(|i| i * i % 300).collect();
    for dtype in ["float32", "float16", "bfloat16"] {
        let saved = folder.path().join(dtype);
        succeed(Command::new(&python).arg(&script).arg(&saved).arg(dtype).env("HF_HUB_OFFLINE", "1"));
        assert!(weights::files_of_folder(&saved)?.len() > 1, "the weights are in several files");
        let difference = difference(&python, &saved, &ids)?;
        eprintln!("{dtype}: logits differ by at most {difference:e}");
        assert!(difference < 1e-3, "{dtype}: {difference}");
    }
    Ok(())
}
