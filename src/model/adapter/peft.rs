//! Adapters in the format of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

use super::{A, AdapterSettings, B, Scaling};
use crate::config::Architecture;
use crate::model::ModelShape;
use crate::model::weights::{self, NamePrefix};
use crate::params::Layout;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// Entries that change nothing about what trained adapters compute: where they come from, how they began, dropout.
const NEUTRAL: &[&str] = &[
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Entries that are read.
const READ: &[&str] = &["lora_alpha", "peft_type", "r", "target_modules", "use_rslora"];

/// Reads an `adapter_config.json`.
///
/// # Errors
/// A message naming the entry, when one is missing, malformed, or asks for an arithmetic that is not plain LoRA.
pub fn read_config(config: &Value) -> Result<AdapterSettings, String> {
    let entries = config.as_object().ok_or("it is not a JSON object")?;
    if let Some(other) = entries.get("peft_type").filter(|kind| **kind != "LORA") {
        return Err(format!("`peft_type` is {other}, which is not supported (only \"LORA\")"));
    }
    for (name, value) in entries.iter().filter(|(name, _)| !READ.contains(&&***name) && !NEUTRAL.contains(&&***name)) {
        let nothing = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => name == "bias" && text == "none",
            Value::Bool(true) | Value::Number(_) => false,
        };
        if !nothing {
            return Err(format!("`{name}` is {value}, which is not supported (only plain LoRA is)"));
        }
    }
    let rank = entries.get("r").and_then(Value::as_u64).filter(|rank| (1..=1 << 20).contains(rank));
    let rank = rank.ok_or_else(|| malformed(entries, "r", "a whole number from 1"))? as usize;
    let alpha = entries.get("lora_alpha").and_then(Value::as_f64).filter(|alpha| alpha.is_finite() && *alpha > 0.0);
    let alpha = alpha.ok_or_else(|| malformed(entries, "lora_alpha", "a number above 0"))?;
    let targets = match entries.get("target_modules") {
        Some(Value::String(text)) if text == super::ALL_LINEAR => vec![text.clone()],
        Some(Value::Array(list)) if !list.is_empty() && list.iter().all(Value::is_string) => {
            list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        }
        _ => return Err(malformed(entries, "target_modules", "a list of names (patterns are not supported)")),
    };
    let scaling = match entries.get("use_rslora") {
        None | Some(Value::Null | Value::Bool(false)) => Scaling::Rank,
        Some(Value::Bool(true)) => Scaling::RootOfRank,
        Some(_) => return Err(malformed(entries, "use_rslora", "true or false")),
    };
    Ok(AdapterSettings { rank, alpha, targets, scaling })
}

fn malformed(entries: &Map<String, Value>, name: &str, expected: &str) -> String {
    match entries.get(name) {
        None => format!("`{name}` is missing"),
        Some(value) => format!("`{name}` is {value}, expected {expected}"),
    }
}

/// The `adapter_config.json` that PEFT reads. `base` is what it finds the base by.
pub fn config(shape: &ModelShape, settings: &AdapterSettings, dropout: f64, base: &str) -> Value {
    let targets = match settings.targets.iter().any(|target| target == super::ALL_LINEAR) {
        true => shape.target_words(),
        false => settings.targets.clone(),
    };
    let alpha = match settings.alpha.fract() == 0.0 {
        true => json!(settings.alpha as i64),
        false => json!(settings.alpha),
    };
    json!({
        "base_model_name_or_path": base,
        "bias": "none",
        // GPT-2's matrices lie [inputs, outputs].
        "fan_in_fan_out": shape.architecture() == Architecture::Gpt2,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": settings.scaling == Scaling::RootOfRank,
    })
}

/// Writes an adapter's folder.
pub fn write(folder: &Path, config: &Value, layout: &Layout, weights: &[f32]) -> Result<()> {
    let path = folder.join(CONFIG);
    std::fs::write(&path, serde_json::to_vec_pretty(config)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    weights::write(&folder.join(WEIGHTS), layout, weights, NamePrefix::None)
}

/// Reads the config of an adapter's folder.
pub fn read_config_file(path: &Path) -> Result<AdapterSettings> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value = serde_json::from_str(&text).with_context(|| format!("{} is not valid JSON", path.display()))?;
    read_config(&value).map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))
}

/// Fills `out` (a flat storage of `layout`) from an adapter's weights.
///
/// # Errors
/// When the file is torn, an adapter is missing or of another shape, a number is not finite, or a tensor is left over.
pub fn load(file: &Path, layout: &Layout, out: &mut [f32]) -> Result<()> {
    ensure!(
        file.is_file(),
        "there is no {} (adapters in a pickle, adapter_model.bin, are never opened: convert them first)",
        file.display()
    );
    let mut stored = BTreeMap::new();
    for (name, place) in weights::headers(&[file.to_owned()])? {
        // Files of PEFT's training code carry the adapter's own name.
        let plain = [(".lora_A.default.weight", A), (".lora_B.default.weight", B)]
            .iter()
            .find_map(|(long, short)| name.strip_suffix(long).map(|path| format!("{path}{short}")));
        let plain = plain.unwrap_or_else(|| name.clone());
        if layout.index_of(&plain).is_none() {
            bail!("{} holds {name}, which is no adapter of this model and these targets", file.display());
        }
        ensure!(stored.insert(plain, place).is_none(), "{} holds {name} twice", file.display());
    }
    weights::load(layout, &stored, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Value {
        json!({
            "peft_type": "LORA", "r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "bias": "none",
            "lora_dropout": 0.1, "use_dora": false, "rank_pattern": {}, "modules_to_save": null,
            "layers_to_transform": null, "init_lora_weights": true, "peft_version": "0.21.2"
        })
    }

    #[test]
    fn scaling_is_alpha_over_rank_or_over_its_root() -> Result<(), String> {
        let settings = read_config(&plain())?;
        assert_eq!((settings.rank, settings.factor()), (8, 1.5));
        let mut stabilized = plain();
        stabilized["use_rslora"] = json!(true);
        assert_eq!(read_config(&stabilized)?.factor(), (12.0 / 8f64.sqrt()) as f32);
        Ok(())
    }

    #[test]
    fn what_is_not_plain_lora_is_refused_by_name() {
        for (name, value) in [
            ("peft_type", json!("IA3")),
            ("use_dora", json!(true)),
            ("bias", json!("all")),
            ("rank_pattern", json!({"h.0": 4})),
            ("modules_to_save", json!(["lm_head"])),
            ("layers_to_transform", json!([0])),
            ("layers_to_transform", json!(0)),
            ("target_modules", json!(".*q_proj")),
            ("target_modules", json!([])),
            ("r", json!(0)),
            ("lora_alpha", json!("much")),
            ("something_new", json!(true)),
        ] {
            let mut config = plain();
            config[name] = value;
            let error = read_config(&config).expect_err(name);
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}
