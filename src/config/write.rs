//! A resolved config as TOML text, complete and in the order of the schema.

use super::*;
use toml::{Table, Value};

/// Every key with its value; keys without one (no clip, no validation) are left out.
pub fn entries(config: &RunConfig) -> Vec<(String, Value)> {
    let mut out: Vec<(String, Value)> = Vec::new();
    let mut put = |key: &str, value: Option<Value>| out.extend(value.map(|value| (key.to_owned(), value)));
    let whole = |number: u64| Some(Value::Integer(number.min(i64::MAX as u64) as i64));
    let size = |number: Option<usize>| number.and_then(|number| whole(number as u64));
    let text = |text: &str| Some(Value::String(text.to_owned()));
    let texts = |list: &[String]| Some(Value::Array(list.iter().cloned().map(Value::String).collect()));
    let RunConfig { model, data, schedule, train, .. } = config;

    put("seed", whole(config.seed));
    put("model.arch", model.arch.and_then(|arch| text(arch.word())));
    put("model.init", model.init.as_ref().map(|init| Value::String(init.to_string())));
    put("model.n_layer", size(model.n_layer));
    put("model.n_head", size(model.n_head));
    put("model.n_kv_head", size(model.n_kv_head));
    put("model.n_embd", size(model.n_embd));
    put("model.n_inner", size(model.n_inner));
    put("model.n_positions", size(model.n_positions));
    put("model.vocab_size", size(model.vocab_size));
    put("model.tie_word_embeddings", model.tie_word_embeddings.map(Value::Boolean));
    put("model.layer_norm_epsilon", model.layer_norm_epsilon.map(Value::Float));
    put("model.rms_norm_epsilon", model.rms_norm_epsilon.map(Value::Float));
    put("model.rope_theta", model.rope_theta.map(Value::Float));
    put("model.dropout", Some(Value::Float(model.dropout)));
    put("tokenizer.source", config.tokenizer.as_ref().map(|source| Value::String(source.to_string())));
    put("data.source", Some(source(&data.source)));
    if !data.files.is_empty() {
        put("data.files", texts(&data.files));
    }
    match &data.examples {
        None => put("data.text_column", text(&data.text_column)),
        Some(examples) => {
            super::examples::entries(examples).into_iter().for_each(|(key, value)| put(key, Some(value)));
        }
    }
    put("data.shuffle", Some(Value::Boolean(data.shuffle)));
    put("data.tokenizer_threads", size(Some(data.tokenizer_threads)));
    put("data.cache_gib", Some(Value::Float(data.cache_gib)));
    if let Some(validation) = &data.validation {
        put("data.validation.source", validation.source.as_ref().map(self::source));
        if !validation.files.is_empty() {
            put("data.validation.files", texts(&validation.files));
        }
        put("data.validation.tokens", whole(validation.tokens));
        put("data.validation.examples", size(validation.examples));
    }
    put("optimizer.name", text(&config.optimizer.name));
    for (key, value) in &config.optimizer.keys {
        put(&format!("optimizer.{key}"), Some(value.clone()));
    }
    out.extend(self::schedule(schedule));
    let mut put = |key: &str, value: Option<Value>| out.extend(value.map(|value| (key.to_owned(), value)));
    match train.duration {
        Duration::Steps(steps) => put("train.steps", whole(steps)),
        Duration::Tokens(tokens) => put("train.tokens", whole(tokens)),
        Duration::Epochs(epochs) => put("train.epochs", Some(Value::Float(epochs))),
    }
    put("train.sequence_length", size(Some(train.sequence_length)));
    put("train.micro_batch", size(Some(train.micro_batch)));
    put("train.tokens_per_step", size(Some(train.tokens_per_step)));
    put("train.grad_clip", train.grad_clip.map(Value::Float));
    put(
        "train.dtype",
        text(match train.dtype {
            DType::Auto => "auto",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::Tf32 => "tf32",
        }),
    );
    put(
        "train.recompute",
        text(match train.recompute {
            Recompute::None => "none",
            Recompute::Block => "block",
        }),
    );
    put("train.device", Some(Value::String(train.device.to_string())));
    put("train.eval_every", whole(train.eval_every));
    put("train.sample_every", whole(train.sample_every));
    put("train.sample_prompt", train.sample_prompt.as_deref().and_then(text));
    put("train.checkpoint_every", whole(train.checkpoint_every));
    put("train.keep_last", size(Some(train.keep_last)));
    if data.validation.is_some() {
        put("train.keep_best", Some(Value::Boolean(train.keep_best)));
    }
    if train.eval_exact_match > 0 {
        put("train.eval_exact_match", size(Some(train.eval_exact_match)));
        put("train.exact_match_tokens", size(Some(train.exact_match_tokens)));
    }
    put("train.tensorboard", Some(Value::Boolean(train.tensorboard)));
    if let Some(lora) = &config.lora {
        put("lora.init", lora.init.as_ref().map(|init| Value::String(init.to_string())));
        put("lora.rank", size(lora.rank));
        put("lora.alpha", lora.alpha.map(Value::Float));
        put("lora.rslora", lora.rslora.map(Value::Boolean));
        put("lora.targets", lora.targets.as_deref().and_then(texts));
        put("lora.dropout", Some(Value::Float(lora.dropout)));
        put(
            "lora.quantize",
            match lora.quantize {
                Quantization::None => None,
                Quantization::Nf4 => text("nf4"),
            },
        );
    }
    out
}

/// A data source's value.
pub fn source(source: &DataSource) -> Value {
    match source {
        DataSource::Quickstart => Value::String("quickstart".into()),
        DataSource::Files(list) => Value::Array(list.iter().map(|s| Value::String(s.to_string())).collect()),
    }
}

/// A list's value; nothing for none.
pub fn texts(list: &[String]) -> Option<Value> {
    (!list.is_empty()).then(|| Value::Array(list.iter().cloned().map(Value::String).collect()))
}

/// The keys of a schedule.
pub fn schedule(schedule: &ScheduleConfig) -> Vec<(String, Value)> {
    let mut out = Vec::new();
    let mut put = |key: &str, value: Value| out.push((format!("schedule.{key}"), value));
    let name = match schedule.name {
        ScheduleName::Cosine => "cosine",
        ScheduleName::Linear => "linear",
        ScheduleName::Constant => "constant",
        ScheduleName::WarmupStableDecay => "wsd",
        ScheduleName::RangeTest => "range_test",
    };
    put("name", Value::String(name.into()));
    put("warmup_steps", Value::Integer(schedule.warmup_steps.min(i64::MAX as u64) as i64));
    if schedule.name != ScheduleName::Constant {
        put("min_lr_ratio", Value::Float(schedule.min_lr_ratio));
    }
    if schedule.name == ScheduleName::WarmupStableDecay {
        put("decay_ratio", Value::Float(schedule.decay_ratio));
    }
    if let Some(steps) = schedule.steps {
        put("steps", Value::Integer(steps.min(i64::MAX as u64) as i64));
    }
    out
}

/// The TOML text of `config`.
pub fn to_toml(config: &RunConfig) -> String {
    table(entries(config)).to_string()
}

/// Keys with dots as tables in tables.
pub fn table(entries: Vec<(String, Value)>) -> Table {
    let mut root = Table::new();
    for (key, value) in entries {
        let mut words: Vec<&str> = key.split('.').collect();
        let Some(last) = words.pop() else { continue };
        let mut table = &mut root;
        for word in words {
            let entry = table.entry(word).or_insert_with(|| Value::Table(Table::new()));
            // Only tables are ever put under a section's name.
            let Value::Table(inner) = entry else { unreachable!("`{word}` is a section") };
            table = inner;
        }
        table.insert(last.to_owned(), value);
    }
    root
}
