//! From raw settings to a resolved run: defaults, ranges, conflicts.

use super::*;

/// Checks `settings` and fills in what they leave out.
pub fn resolve(settings: Settings, name: &str, base: &Path) -> Result<RunConfig, ConfigError> {
    if settings.is_set("task.name") {
        let message = "this is a config of a small task of the laboratory: run it with `vrtrain lab train`";
        return Err(settings.error("task.name", message));
    }
    if let Some(key) = settings.keys().find(|key| key.starts_with("task.")) {
        return Err(settings.error(key, format!("`{key}` has no meaning without `task.name`")));
    }
    let model = model(&settings, base)?;
    let data = data(&settings, base)?;
    let train = train(&settings, &data)?;
    let schedule = schedule(&settings)?;
    let tokenizer =
        settings.text("tokenizer.source").map(|text| Source::parse(text, &settings.base_of("tokenizer.source", base)));
    let Some(optimizer_name) = settings.text("optimizer.name") else {
        return Err(ConfigError::flag(name, "`optimizer.name` is missing: give for example name = \"vradam\""));
    };
    let optimizer = OptimizerSettings { name: optimizer_name.to_owned(), keys: settings.optimizer_keys() };
    let seed = settings.whole("seed").unwrap_or(1337);
    let lora = lora(&settings, base)?;
    let settings = SettingsOrigin(settings);
    Ok(RunConfig { name: name.to_owned(), seed, model, tokenizer, data, optimizer, schedule, train, lora, settings })
}

/// `[lora]`, if any of its keys is given.
fn lora(settings: &Settings, base: &Path) -> Result<Option<LoraConfig>, ConfigError> {
    const OWN: [&str; 4] = ["lora.rank", "lora.alpha", "lora.rslora", "lora.targets"];
    let others = ["lora.init", "lora.dropout", "lora.quantize"];
    if !OWN.iter().chain(&others).any(|key| settings.is_set(key)) {
        return Ok(None);
    }
    let init = settings.text("lora.init").map(|text| Source::parse(text, &settings.base_of("lora.init", base)));
    if let Some(init) = &init
        && let Some(key) = OWN.iter().find(|key| settings.is_set(key))
    {
        let message = format!("`{key}` conflicts with `lora.init`: it is read from {init}; leave it out");
        return Err(settings.error(key, message));
    }
    let fresh = init.is_none();
    let rank = positive(settings, "lora.rank")?.unwrap_or(16);
    if rank > 1 << 16 {
        return Err(settings.error("lora.rank", format!("`lora.rank` = {rank} is too large")));
    }
    // Twice the rank: the usual factor of 2.
    let alpha = within(settings, "lora.alpha", 2.0 * rank as f64, 1e-6, 1e9)?;
    let targets = settings.texts("lora.targets").unwrap_or_else(|| vec!["all-linear".into()]);
    if targets.is_empty() || targets.iter().any(String::is_empty) {
        return Err(settings.error("lora.targets", "`lora.targets` is empty: give names of layers, or \"all-linear\""));
    }
    let words = [("nf4", Quantization::Nf4)];
    Ok(Some(LoraConfig {
        init,
        rank: fresh.then_some(rank),
        alpha: fresh.then_some(alpha),
        rslora: fresh.then_some(settings.truth("lora.rslora").unwrap_or(false)),
        targets: fresh.then_some(targets),
        dropout: within(settings, "lora.dropout", 0.0, 0.0, 0.99)?,
        quantize: choice(settings, "lora.quantize", Quantization::None, &words)?,
    }))
}

/// One of a closed list of words.
pub(super) fn choice<T: Copy>(
    settings: &Settings,
    key: &str,
    default: T,
    words: &[(&str, T)],
) -> Result<T, ConfigError> {
    let Some(given) = settings.text(key) else { return Ok(default) };
    if let Some((_, value)) = words.iter().find(|(word, _)| *word == given) {
        return Ok(*value);
    }
    let list: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
    let near = words.iter().map(|(word, _)| (strsim::damerau_levenshtein(word, given), word)).min();
    let hint = near
        .filter(|(distance, _)| *distance <= 2)
        .map_or(String::new(), |(_, word)| format!("; did you mean {word:?}?"));
    Err(settings.error(key, format!("`{key}` must be one of {}, found {given:?}{hint}", list.join(", "))))
}

/// A whole number that must be at least 1.
pub(super) fn positive(settings: &Settings, key: &str) -> Result<Option<usize>, ConfigError> {
    match settings.whole(key) {
        Some(0) => Err(settings.error(key, format!("`{key}` must be at least 1"))),
        Some(number) => match usize::try_from(number) {
            Ok(number) if number <= 1 << 40 => Ok(Some(number)),
            _ => Err(settings.error(key, format!("`{key}` = {number} is too large"))),
        },
        None => Ok(None),
    }
}

/// A number within [low, high].
pub(super) fn within(settings: &Settings, key: &str, default: f64, low: f64, high: f64) -> Result<f64, ConfigError> {
    let value = settings.number(key).unwrap_or(default);
    if value.is_finite() && (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(settings.error(key, format!("`{key}` must be between {low} and {high}, found {value}")))
}

/// Keys of a model's shape that both architectures have.
const SHAPE_KEYS: &[&str] =
    &["n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size", "tie_word_embeddings"];

/// Keys of a model's shape that one architecture has.
fn own_keys(arch: Architecture) -> &'static [&'static str] {
    match arch {
        Architecture::Gpt2 => &["layer_norm_epsilon"],
        Architecture::Llama => &["n_kv_head", "rms_norm_epsilon", "rope_theta"],
    }
}

fn model(settings: &Settings, base: &Path) -> Result<ModelConfig, ConfigError> {
    use Architecture::{Gpt2, Llama};
    let words = [(Gpt2.word(), Gpt2), (Llama.word(), Llama)];
    let given = settings.is_set("model.arch").then(|| choice(settings, "model.arch", Gpt2, &words)).transpose()?;
    let init = settings.text("model.init").map(|text| Source::parse(text, &settings.base_of("model.init", base)));
    // From scratch the default is GPT-2; `init` says for itself what it is.
    let arch = if init.is_none() { Some(given.unwrap_or(Gpt2)) } else { given };
    for (key, owner) in [Gpt2, Llama].into_iter().flat_map(|arch| own_keys(arch).iter().map(move |key| (*key, arch))) {
        let key = format!("model.{key}");
        if let Some(arch) = arch.filter(|arch| *arch != owner && settings.is_set(&key)) {
            let message = format!("`{key}` has no meaning for `model.arch` = \"{}\"; leave it out", arch.word());
            return Err(settings.error(&key, message));
        }
    }
    if let Some(init) = &init {
        let keys = [SHAPE_KEYS, own_keys(Gpt2), own_keys(Llama)].concat();
        for key in keys.iter().map(|key| format!("model.{key}")) {
            if settings.is_set(&key) {
                let message =
                    format!("`{key}` conflicts with `model.init`: the shape is read from {init}; leave it out");
                return Err(settings.error(&key, message));
            }
        }
    }
    let number = |key: &str, low: f64, high: f64| {
        settings.is_set(key).then(|| within(settings, key, low, low, high)).transpose()
    };
    let config = ModelConfig {
        arch,
        init,
        n_layer: positive(settings, "model.n_layer")?,
        n_head: positive(settings, "model.n_head")?,
        n_kv_head: positive(settings, "model.n_kv_head")?,
        n_embd: positive(settings, "model.n_embd")?,
        n_inner: positive(settings, "model.n_inner")?,
        n_positions: positive(settings, "model.n_positions")?,
        vocab_size: positive(settings, "model.vocab_size")?,
        tie_word_embeddings: settings.truth("model.tie_word_embeddings"),
        layer_norm_epsilon: number("model.layer_norm_epsilon", 1e-12, 0.1)?,
        rms_norm_epsilon: number("model.rms_norm_epsilon", 1e-12, 0.1)?,
        rope_theta: number("model.rope_theta", 1.0, 1e12)?,
        dropout: within(settings, "model.dropout", 0.0, 0.0, 0.99)?,
    };
    if config.init.is_none() {
        check_shape(settings, &config)?;
    }
    Ok(config)
}

/// Whether a model from scratch has its sizes, and they divide as they must.
fn check_shape(settings: &Settings, config: &ModelConfig) -> Result<(), ConfigError> {
    for (key, value) in [("n_layer", config.n_layer), ("n_head", config.n_head), ("n_embd", config.n_embd)] {
        if value.is_none() {
            let message =
                format!("`model.{key}` is missing: a model from scratch needs its shape (or give `model.init`)");
            return Err(ConfigError::flag("[model]", message));
        }
    }
    let (Some(heads), Some(width)) = (config.n_head, config.n_embd) else { return Ok(()) };
    if width % heads != 0 {
        let message = format!("`model.n_embd` = {width} must be a multiple of `model.n_head` = {heads}");
        return Err(settings.error("model.n_embd", message));
    }
    if config.arch == Some(Architecture::Llama) && (width / heads) % 2 != 0 {
        let message =
            format!("`model.n_embd` / `model.n_head` = {} must be even: rotary positions turn pairs", width / heads);
        return Err(settings.error("model.n_head", message));
    }
    if let Some(kv_heads) = config.n_kv_head
        && heads % kv_heads != 0
    {
        let message = format!("`model.n_head` = {heads} must be a multiple of `model.n_kv_head` = {kv_heads}");
        return Err(settings.error("model.n_kv_head", message));
    }
    Ok(())
}

pub(super) fn data_source(settings: &Settings, key: &str, base: &Path) -> Result<Option<DataSource>, ConfigError> {
    let Some(texts) = settings.texts(key) else { return Ok(None) };
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err(settings.error(key, format!("`{key}` is empty: give a hub data set, a folder or files")));
    }
    if texts == ["quickstart"] {
        return Ok(Some(DataSource::Quickstart));
    }
    let base = settings.base_of(key, base);
    let sources: Vec<Source> = texts.iter().map(|text| Source::parse(text, &base)).collect();
    for (text, source) in texts.iter().zip(&sources) {
        if let Source::Path(path) = source
            && !path.exists()
        {
            let hint = if looks_like_hub_id(text) { "" } else { " (a hub data set is written owner/name)" };
            return Err(settings.error(key, format!("`{key}`: there is no file or folder {}{hint}", path.display())));
        }
    }
    Ok(Some(DataSource::Files(sources)))
}

/// The globs that `key` gives, which choose among the files of `source` (what `source_key` gives). Beside files that are
/// named one by one they have no meaning; those of the config go where the command line names such files instead.
pub(super) fn globs(
    settings: &Settings,
    key: &str,
    source_key: &str,
    source: &DataSource,
) -> Result<Vec<String>, ConfigError> {
    let globs = settings.texts(key).unwrap_or_default();
    let DataSource::Files(sources) = source else { return Ok(globs) };
    let is_file = |source: &Source| matches!(source, Source::Path(path) if path.is_file());
    if globs.is_empty() || !sources.iter().all(is_file) {
        return Ok(globs);
    }
    if settings.is_assigned(source_key) && !settings.is_assigned(key) {
        return Ok(Vec::new());
    }
    let (globs, file) = (globs.join(", "), &sources[0]);
    let message = format!(
        "`{key}` = {globs} chooses among the files of a folder or data set, and `{source_key}` = {file} is a file: leave \
         it out"
    );
    Err(settings.error(key, message))
}

fn data(settings: &Settings, base: &Path) -> Result<DataConfig, ConfigError> {
    let Some(source) = data_source(settings, "data.source", base)? else {
        let message = "`data.source` is missing: give a hub data set (owner/name), a folder or files";
        return Err(ConfigError::flag("[data]", message));
    };
    if source == DataSource::Quickstart {
        refuse_idle_of_quickstart(settings)?;
    }
    let validation_given =
        ["source", "files", "tokens", "examples"].iter().any(|key| settings.is_set(&format!("data.validation.{key}")));
    let validation = if validation_given {
        let tokens = match positive(settings, "data.validation.tokens")? {
            Some(tokens) => tokens as u64,
            None => 1 << 20,
        };
        let validation_source = data_source(settings, "data.validation.source", base)?;
        if validation_source == Some(DataSource::Quickstart) {
            let message = "`data.validation.source`: the quickstart's problems go with its own training alone";
            return Err(settings.error("data.validation.source", message));
        }
        let files = match &validation_source {
            Some(own) => globs(settings, "data.validation.files", "data.validation.source", own)?,
            None => settings.texts("data.validation.files").unwrap_or_default(),
        };
        if validation_source.is_none() && files.is_empty() && source != DataSource::Quickstart {
            let message = "`data.validation` needs `files` (a glob of the training source) or a `source` of its own";
            return Err(settings.error("data.validation.tokens", message));
        }
        let examples = positive(settings, "data.validation.examples")?;
        Some(ValidationConfig { source: validation_source, files, tokens, examples })
    } else {
        None
    };
    Ok(DataConfig {
        files: globs(settings, "data.files", "data.source", &source)?,
        source,
        text_column: settings.text("data.text_column").unwrap_or("text").to_owned(),
        examples: super::examples::resolve(settings)?,
        shuffle: settings.truth("data.shuffle").unwrap_or(true),
        tokenizer_threads: positive(settings, "data.tokenizer_threads")?.unwrap_or(1),
        cache_gib: within(settings, "data.cache_gib", 8.0, 0.0, 1e6)?,
        validation,
    })
}

/// Refuses keys that choose among files: the quickstart's data are generated.
fn refuse_idle_of_quickstart(settings: &Settings) -> Result<(), ConfigError> {
    let given = |key: &&str| settings.texts(key).is_some_and(|texts| !texts.is_empty());
    // A resolved config says the default column.
    let column = settings.text("data.text_column").filter(|column| *column != "text").map(|_| "data.text_column");
    let idle = ["data.files", "data.validation.source", "data.validation.files"].into_iter().find(given).or(column);
    match idle {
        None => Ok(()),
        Some(key) => {
            let message = format!("`{key}` has no meaning for the quickstart, whose data are generated; leave it out");
            Err(settings.error(key, message))
        }
    }
}

pub(super) fn schedule(settings: &Settings) -> Result<ScheduleConfig, ConfigError> {
    use ScheduleName::{Constant, Cosine, Linear, RangeTest, WarmupStableDecay};
    let words = [
        ("cosine", Cosine),
        ("linear", Linear),
        ("constant", Constant),
        ("wsd", WarmupStableDecay),
        ("range_test", RangeTest),
    ];
    let name = choice(settings, "schedule.name", Cosine, &words)?;
    for (key, used) in
        [("schedule.min_lr_ratio", name != Constant), ("schedule.decay_ratio", name == WarmupStableDecay)]
    {
        if settings.is_set(key) && !used {
            return Err(settings.error(key, format!("`{key}` has no meaning for this schedule; leave it out")));
        }
    }
    Ok(ScheduleConfig {
        name,
        warmup_steps: settings.whole("schedule.warmup_steps").unwrap_or(0),
        min_lr_ratio: within(settings, "schedule.min_lr_ratio", 0.0, 0.0, 1.0)?,
        decay_ratio: within(settings, "schedule.decay_ratio", 0.2, 0.0, 1.0)?,
        steps: positive(settings, "schedule.steps")?.map(|steps| steps as u64),
    })
}

pub(super) fn duration(settings: &Settings) -> Result<Duration, ConfigError> {
    let given: Vec<&str> = super::settings::LENGTHS.into_iter().filter(|key| settings.is_set(key)).collect();
    match given[..] {
        [] => Err(ConfigError::flag("[train]", "give one of `train.steps`, `train.tokens`, `train.epochs`")),
        ["train.steps"] => Ok(Duration::Steps(positive(settings, "train.steps")?.unwrap_or(1) as u64)),
        ["train.tokens"] => Ok(Duration::Tokens(positive(settings, "train.tokens")?.unwrap_or(1) as u64)),
        ["train.epochs"] => Ok(Duration::Epochs(within(settings, "train.epochs", 1.0, 1e-9, 1e9)?)),
        [first, second, ..] => Err(settings
            .error(second, format!("`{second}` conflicts with `{first}` ({}): give one", settings.origin(first).0))),
        [other] => Err(settings.error(other, "not a length of a run")),
    }
}

fn device(settings: &Settings) -> Result<DeviceChoice, ConfigError> {
    let key = "train.device";
    let choice = settings.text(key).map_or(Ok(DeviceChoice::Auto), str::parse);
    choice.map_err(|wrong: String| settings.error(key, format!("`{key}` {wrong}")))
}

fn train(settings: &Settings, data: &DataConfig) -> Result<TrainConfig, ConfigError> {
    let missing = |key: &str| ConfigError::flag("[train]", format!("`train.{key}` is missing"));
    let sequence_length = positive(settings, "train.sequence_length")?.ok_or_else(|| missing("sequence_length"))?;
    let micro_batch = positive(settings, "train.micro_batch")?.ok_or_else(|| missing("micro_batch"))?;
    let micro_tokens = micro_batch.checked_mul(sequence_length).filter(|tokens| *tokens <= 1 << 32);
    let Some(micro_tokens) = micro_tokens else {
        return Err(settings.error("train.micro_batch", "`train.micro_batch` * `train.sequence_length` is too large"));
    };
    let tokens_per_step = positive(settings, "train.tokens_per_step")?.unwrap_or(micro_tokens);
    if tokens_per_step % micro_tokens != 0 {
        let nearest = (tokens_per_step / micro_tokens).max(1) * micro_tokens;
        let message = format!(
            "`train.tokens_per_step` = {tokens_per_step} must be a multiple of micro_batch * sequence_length = \
             {micro_batch} * {sequence_length} = {micro_tokens}; the nearest is {nearest}"
        );
        return Err(settings.error("train.tokens_per_step", message));
    }
    let grad_clip = settings.number("train.grad_clip").unwrap_or(0.0);
    if !(grad_clip.is_finite() && grad_clip >= 0.0) {
        let message = format!("`train.grad_clip` must be a number from 0 (0: off), found {grad_clip}");
        return Err(settings.error("train.grad_clip", message));
    }
    let dtypes = [("auto", DType::Auto), ("f32", DType::F32), ("bf16", DType::Bf16), ("tf32", DType::Tf32)];
    Ok(TrainConfig {
        duration: duration(settings)?,
        sequence_length,
        micro_batch,
        tokens_per_step,
        grad_clip: (grad_clip > 0.0).then_some(grad_clip),
        dtype: choice(settings, "train.dtype", DType::Auto, &dtypes)?,
        recompute: choice(
            settings,
            "train.recompute",
            Recompute::None,
            &[("none", Recompute::None), ("block", Recompute::Block)],
        )?,
        device: device(settings)?,
        eval_every: eval_every(settings, data)?,
        sample_every: settings.whole("train.sample_every").unwrap_or(0),
        sample_prompt: sample_prompt(settings)?,
        checkpoint_every: settings.whole("train.checkpoint_every").unwrap_or(0),
        keep_last: positive(settings, "train.keep_last")?.unwrap_or(3),
        keep_best: keep_best(settings, data)?,
        eval_exact_match: eval_exact_match(settings, data)?,
        exact_match_tokens: positive(settings, "train.exact_match_tokens")?.unwrap_or(256),
        tensorboard: settings.truth("train.tensorboard").unwrap_or(false),
    })
}

fn eval_every(settings: &Settings, data: &DataConfig) -> Result<u64, ConfigError> {
    let key = "train.eval_every";
    let every = settings.whole(key).unwrap_or(0);
    if every > 0 && data.validation.is_none() {
        let message =
            format!("`{key}` = {every}, but there is nothing to evaluate on: set `data.validation`, or leave it out");
        return Err(settings.error(key, message));
    }
    Ok(every)
}

fn sample_prompt(settings: &Settings) -> Result<Option<String>, ConfigError> {
    let key = "train.sample_prompt";
    // An explicit 0 switches off the samples of a config that has a prompt for them.
    if settings.is_set(key) && !settings.is_set("train.sample_every") {
        return Err(settings.error(key, format!("`{key}` has no meaning without `train.sample_every`")));
    }
    Ok(settings.text(key).map(str::to_owned))
}

/// The best checkpoint is kept where examples are trained on, unless the config says otherwise.
fn keep_best(settings: &Settings, data: &DataConfig) -> Result<bool, ConfigError> {
    let key = "train.keep_best";
    match (settings.truth(key), &data.validation) {
        (Some(true), None) => {
            Err(settings.error(key, format!("`{key}` needs a validation loss: set `data.validation`")))
        }
        (Some(given), _) => Ok(given),
        (None, validation) => Ok(validation.is_some() && data.examples.is_some()),
    }
}

fn eval_exact_match(settings: &Settings, data: &DataConfig) -> Result<usize, ConfigError> {
    let key = "train.eval_exact_match";
    let problems = settings.whole(key).unwrap_or(0) as usize;
    if problems > 0 && data.validation.is_none() {
        return Err(settings.error(key, format!("`{key}` needs held-out examples: set `data.validation`")));
    }
    if !settings.is_set(key) && settings.is_set("train.exact_match_tokens") {
        let key = "train.exact_match_tokens";
        return Err(settings.error(key, format!("`{key}` has no meaning without `train.eval_exact_match`")));
    }
    Ok(problems)
}
