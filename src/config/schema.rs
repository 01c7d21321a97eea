//! The closed list of config keys: what exists, of which type. Anything else is an error.

/// The type of a key's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole number from 0.
    Whole,
    /// A number, whole numbers included.
    Number,
    /// true or false.
    Truth,
    /// A string.
    Text,
    /// A string or a list of strings.
    Texts,
    /// A day: TOML's date, or a string that reads like one.
    Date,
    /// Any plain value: the optimizer that is chosen checks its own keys.
    Optimizer,
}

impl Kind {
    /// How an error calls it.
    pub fn expected(self) -> &'static str {
        match self {
            Self::Whole => "a whole number from 0",
            Self::Number => "a number",
            Self::Truth => "true or false",
            Self::Text => "a string in quotes",
            Self::Texts => "a string in quotes or a list of such strings",
            Self::Date => "a date like 2026-01-31",
            Self::Optimizer => "a number, a string in quotes, or true or false",
        }
    }
}

/// The key `optimizer.name` is checked here; every other key below `optimizer.` by the optimizer itself.
const OPTIMIZER_PREFIX: &str = "optimizer.";

/// Every key outside `[optimizer]`, in the order in which a resolved config is written.
pub const KEYS: &[(&str, Kind)] = &[
    ("seed", Kind::Whole),
    ("model.arch", Kind::Text),
    ("model.init", Kind::Text),
    ("model.n_layer", Kind::Whole),
    ("model.n_head", Kind::Whole),
    ("model.n_kv_head", Kind::Whole),
    ("model.n_embd", Kind::Whole),
    ("model.n_inner", Kind::Whole),
    ("model.n_positions", Kind::Whole),
    ("model.vocab_size", Kind::Whole),
    ("model.tie_word_embeddings", Kind::Truth),
    ("model.layer_norm_epsilon", Kind::Number),
    ("model.rms_norm_epsilon", Kind::Number),
    ("model.rope_theta", Kind::Number),
    ("model.dropout", Kind::Number),
    ("task.name", Kind::Text),
    ("task.batch", Kind::Whole),
    ("task.loss", Kind::Text),
    ("task.augment", Kind::Truth),
    ("task.examples", Kind::Whole),
    ("task.validation_examples", Kind::Whole),
    ("task.side", Kind::Whole),
    ("task.layers", Kind::Whole),
    ("task.width", Kind::Whole),
    ("task.sharpness_every", Kind::Whole),
    ("task.sharpness_examples", Kind::Whole),
    ("task.sharpness_iterations", Kind::Whole),
    ("tokenizer.source", Kind::Text),
    ("data.source", Kind::Texts),
    ("data.files", Kind::Texts),
    ("data.text_column", Kind::Text),
    ("data.format", Kind::Text),
    ("data.prompt_column", Kind::Text),
    ("data.completion_column", Kind::Text),
    ("data.template", Kind::Text),
    ("data.messages_column", Kind::Text),
    ("data.date", Kind::Date),
    ("data.packing", Kind::Truth),
    ("data.too_long", Kind::Text),
    ("data.shuffle", Kind::Truth),
    ("data.tokenizer_threads", Kind::Whole),
    ("data.cache_gib", Kind::Number),
    ("data.validation.source", Kind::Texts),
    ("data.validation.files", Kind::Texts),
    ("data.validation.tokens", Kind::Whole),
    ("data.validation.examples", Kind::Whole),
    ("optimizer.name", Kind::Text),
    ("schedule.name", Kind::Text),
    ("schedule.warmup_steps", Kind::Whole),
    ("schedule.min_lr_ratio", Kind::Number),
    ("schedule.decay_ratio", Kind::Number),
    ("schedule.steps", Kind::Whole),
    ("train.steps", Kind::Whole),
    ("train.tokens", Kind::Whole),
    ("train.epochs", Kind::Number),
    ("train.sequence_length", Kind::Whole),
    ("train.micro_batch", Kind::Whole),
    ("train.tokens_per_step", Kind::Whole),
    ("train.grad_clip", Kind::Number),
    ("train.dtype", Kind::Text),
    ("train.recompute", Kind::Text),
    ("train.device", Kind::Text),
    ("train.eval_every", Kind::Whole),
    ("train.sample_every", Kind::Whole),
    ("train.sample_prompt", Kind::Text),
    ("train.checkpoint_every", Kind::Whole),
    ("train.keep_last", Kind::Whole),
    ("train.keep_best", Kind::Truth),
    ("train.eval_exact_match", Kind::Whole),
    ("train.exact_match_tokens", Kind::Whole),
    ("train.tensorboard", Kind::Truth),
    ("lora.init", Kind::Text),
    ("lora.rank", Kind::Whole),
    ("lora.alpha", Kind::Number),
    ("lora.rslora", Kind::Truth),
    ("lora.targets", Kind::Texts),
    ("lora.dropout", Kind::Number),
    ("lora.quantize", Kind::Text),
];

/// The kind of `key`, if such a key exists.
pub fn kind_of(key: &str) -> Option<Kind> {
    if let Some((_, kind)) = KEYS.iter().find(|(name, _)| *name == key) {
        return Some(*kind);
    }
    let own = key.strip_prefix(OPTIMIZER_PREFIX)?;
    (!own.is_empty() && !own.contains('.')).then_some(Kind::Optimizer)
}

/// Whether `path` is a section (a table that may hold keys).
pub fn is_section(path: &str) -> bool {
    path.is_empty() || KEYS.iter().any(|(key, _)| key.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

/// The existing key or section nearest to `key`: the same last word elsewhere, else the least changed spelling.
pub fn nearest(key: &str) -> Option<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let sections = ["model", "task", "tokenizer", "data", "data.validation", "optimizer", "schedule", "train", "lora"];
    let known = KEYS.iter().map(|(name, _)| *name).chain(sections);
    let same_word: Vec<_> = known.clone().filter(|name| last(name) == last(key)).collect();
    if let [only] = same_word[..] {
        return Some(only.to_owned());
    }
    let scored = known.map(|name| (strsim::damerau_levenshtein(name, key), name));
    let (distance, name) = scored.min_by_key(|(distance, _)| *distance)?;
    (distance <= 3.max(last(key).len() / 3)).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_or_misplaced_key_finds_its_nearest() {
        assert_eq!(nearest("train.step").as_deref(), Some("train.steps"));
        assert_eq!(nearest("trian.micro_batch").as_deref(), Some("train.micro_batch"));
        assert_eq!(nearest("model.grad_clip").as_deref(), Some("train.grad_clip"));
        assert_eq!(nearest("data.quite_another_thing"), None);
    }

    #[test]
    fn sections_and_keys_are_told_apart() {
        assert!(is_section("data") && is_section("data.validation") && !is_section("data.source"));
        assert_eq!(kind_of("optimizer.beta3"), Some(Kind::Optimizer));
        assert_eq!(kind_of("optimizer.name"), Some(Kind::Text));
        assert_eq!(kind_of("optimizer.a.b"), None);
    }
}
