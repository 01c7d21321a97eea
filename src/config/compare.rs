//! What a resumed run may change: lengths, intervals and places, never the mathematics.

use super::RunConfig;
use super::write::entries;
use std::collections::BTreeMap;

/// Keys that a resumed run may change freely.
const FREE: &[&str] = &[
    "train.steps",
    "train.tokens",
    "train.epochs",
    "train.eval_every",
    "train.sample_every",
    "train.sample_prompt",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.eval_exact_match",
    "train.exact_match_tokens",
    "train.tensorboard",
    "data.tokenizer_threads",
    "data.cache_gib",
];

/// The keys in which `new` differs from `old` although a resumed run must not change them: (key, old, new).
pub fn changed_mathematics(old: &RunConfig, new: &RunConfig) -> Vec<(String, String, String)> {
    let shown = |config: &RunConfig| -> BTreeMap<String, String> {
        entries(config).into_iter().map(|(key, value)| (key, value.to_string())).collect()
    };
    let (old, new) = (shown(old), shown(new));
    let absent = || "(absent)".to_owned();
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let differing = keys.into_iter().filter(|key| old.get(*key) != new.get(*key) && !FREE.contains(&key.as_str()));
    differing
        .map(|key| {
            let value = |map: &BTreeMap<String, String>| map.get(key).cloned().unwrap_or_else(absent);
            (key.clone(), value(&old), value(&new))
        })
        .collect()
}
