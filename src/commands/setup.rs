//! From a resolved config to opened things: the model's shape, the tokenizer, the data. Nothing is written here.

use super::shape;
use super::target::{Target, Weights, model_folder};
use crate::config::{ConfigError, ModelConfig, Source};
use crate::data::{ByteSource, FileKind, NamedFiles, SourceFile, TextTokenizer, local_files, select};
use crate::hub::{Hub, HubFile, Listing, RemoteFile, RepoId, RepoKind};
use crate::model::{ModelShape, TextMarks, weights};
use crate::params::Layout;
use crate::train::{checkpoint, is_run};
use anyhow::{Context, Result, bail, ensure};
use std::cell::OnceCell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The files that make a tokenizer, as far as a repository has them.
pub const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];

/// The hub client, made when the first thing needs it: a run on local files asks nothing of the environment.
#[derive(Default)]
pub struct LazyHub {
    cell: OnceCell<Hub>,
    cache_bytes: Option<u64>,
}

impl LazyHub {
    /// A client whose cache of byte ranges holds at most `gib`.
    pub fn with_cache_gib(gib: f64) -> Self {
        Self { cell: OnceCell::new(), cache_bytes: Some((gib * crate::train::GIB) as u64) }
    }

    pub fn get(&self) -> Result<&Hub> {
        if let Some(hub) = self.cell.get() {
            return Ok(hub);
        }
        let mut settings = crate::hub::Settings::from_env()?;
        if let Some(bytes) = self.cache_bytes {
            settings.range_cache_bytes = bytes;
        }
        let hub = Hub::new(settings)?;
        Ok(self.cell.get_or_init(|| hub))
    }
}

/// Reads a Hugging Face config.json.
pub fn read_model_config(path: &Path) -> Result<ModelShape> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the model's {}", path.display()))?;
    let value = serde_json::from_str(&text).with_context(|| format!("{} is not valid JSON", path.display()))?;
    ModelShape::from_hugging_face(&value).map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))
}

/// A model on the hub: its shape is here, its weights are not yet.
pub struct HubModel {
    pub config: ModelShape,
    /// The cache's snapshot folder, which holds config.json and the tokenizer's files.
    pub folder: PathBuf,
    repo: RepoId,
    listing: Listing,
}

/// Looks a model up on the hub and fetches its config and tokenizer.
pub fn hub_model(hub: &Hub, id: &str) -> Result<HubModel> {
    let repo = RepoId::parse(RepoKind::Model, id)?;
    let listing = hub.list(&repo)?;
    let config_path = hub.download(&repo, "config.json")?;
    let config = read_model_config(&config_path)?;
    for name in TOKENIZER_FILES {
        if listing.files.iter().any(|file| file.path == *name) {
            hub.download(&repo, name)?;
        }
    }
    let folder = config_path.parent().context("a cached file lies in no folder")?.to_owned();
    Ok(HubModel { config, folder, repo, listing })
}

impl HubModel {
    fn file(&self, name: &str) -> Option<&HubFile> {
        self.listing.files.iter().find(|file| file.path == name)
    }

    /// Names of the weight files; a sharded model's index is fetched for that.
    fn weight_files(&self, hub: &Hub) -> Result<Vec<String>> {
        if self.file(weights::SINGLE).is_some() {
            return Ok(vec![weights::SINGLE.to_owned()]);
        }
        ensure!(
            self.file(weights::INDEX).is_some(),
            "{} has neither {} nor {} (vrtrain reads safetensors only, never pickles)",
            self.repo.id,
            weights::SINGLE,
            weights::INDEX
        );
        let path = hub.download(&self.repo, weights::INDEX)?;
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        weights::files_of_index(&text).with_context(|| format!("in {}'s {}", self.repo.id, weights::INDEX))
    }

    /// How many bytes the weights have.
    pub fn weight_bytes(&self, hub: &Hub) -> Result<u64> {
        let files = self.weight_files(hub)?;
        Ok(files.iter().filter_map(|name| self.file(name)).map(|file| file.size).sum())
    }

    /// Fetches the weights (or finds them in the cache).
    pub fn download_weights(&self, hub: &Hub) -> Result<Vec<PathBuf>> {
        let files = self.weight_files(hub)?;
        files.iter().map(|name| Ok(hub.download(&self.repo, name)?)).collect()
    }
}

/// The model of a run before its weights are read.
pub struct ModelPlan {
    pub config: ModelShape,
    pub initial: Initial,
}

/// Where the initial weights come from.
pub enum Initial {
    Scratch,
    Folder(PathBuf),
    /// A verified checkpoint of another run.
    OtherRun(PathBuf),
    Hub(Box<HubModel>),
    /// The run goes on: its checkpoint has them.
    Checkpoint,
}

impl Initial {
    /// The weight files.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        match self {
            Self::Scratch => Ok(Vec::new()),
            Self::Folder(folder) => weights::files_of_folder(folder),
            Self::OtherRun(folder) => Ok(vec![folder.join(weights::SINGLE)]),
            Self::Hub(model) => model.download_weights(LazyHub::default().get()?),
            Self::Checkpoint => bail!("the weights of a resumed run are in its checkpoint"),
        }
    }

    /// How many bytes the weight files have.
    pub fn weight_bytes(&self) -> Result<u64> {
        match self {
            Self::Hub(model) => model.weight_bytes(LazyHub::default().get()?),
            _ => {
                let sizes = self.files()?.into_iter().map(|file| Ok(std::fs::metadata(file)?.len()));
                sizes.sum::<Result<u64>>()
            }
        }
    }

    /// Fills `weights` (a flat storage of `layout`).
    pub fn load(&self, shape: &ModelShape, layout: &Layout, seed: u64, numbers: &mut [f32]) -> Result<()> {
        match self {
            Self::Scratch => {
                shape.initialize(layout, seed, numbers);
                return Ok(());
            }
            Self::OtherRun(folder) => checkpoint::read_weights(folder, layout, numbers),
            Self::Folder(_) | Self::Hub(_) | Self::Checkpoint => shape.load(layout, &self.files()?, numbers),
        }
        .context("cannot load `model.init`")
    }
}

/// The shape of a run's model. `vocabulary` is the tokenizer's, `sequence_length` the run's.
pub fn model_plan(
    model: &ModelConfig,
    hub: &LazyHub,
    vocabulary: Option<usize>,
    sequence_length: usize,
) -> Result<ModelPlan> {
    let plan = match &model.init {
        Some(Source::Path(folder)) => {
            ensure!(folder.is_dir(), "`model.init`: there is no folder {}", folder.display());
            let target = Target::open(&folder.to_string_lossy()).context("`model.init`")?;
            if let Weights::Checkpoint(checkpoint) = target.weights {
                ensure!(
                    target.adapted.is_none(),
                    "`model.init`: {} trained adapters: `vrtrain export --merge` makes a model of it first",
                    folder.display()
                );
                let plan = ModelPlan { config: target.config, initial: Initial::OtherRun(checkpoint) };
                return check_architecture(model, plan);
            }
            let config = read_model_config(&folder.join("config.json"))?;
            ModelPlan { config, initial: Initial::Folder(folder.clone()) }
        }
        Some(Source::Hub(id)) => {
            let found = hub_model(hub.get()?, id).with_context(|| format!("`model.init` = {id}"))?;
            ModelPlan { config: found.config.clone(), initial: Initial::Hub(Box::new(found)) }
        }
        None => {
            let config = shape::from_scratch(model, vocabulary, sequence_length)?;
            return Ok(ModelPlan { config, initial: Initial::Scratch });
        }
    };
    check_architecture(model, plan)
}

/// Whether `model.init` is of the architecture that was asked for.
fn check_architecture(model: &ModelConfig, plan: ModelPlan) -> Result<ModelPlan> {
    let found = plan.config.architecture();
    match model.arch {
        Some(asked) if asked != found => {
            let (asked, found) = (asked.word(), found.word());
            let message =
                format!("it is {asked:?}, but the config.json of `model.init` is of a {found:?}; leave it out");
            Err(ConfigError::flag("model.arch", message).into())
        }
        _ => Ok(plan),
    }
}

/// A tokenizer and the folder that its files lie in.
pub struct FoundTokenizer {
    pub tokenizer: TextTokenizer,
    pub folder: PathBuf,
    pub files: Vec<PathBuf>,
}

/// The tokenizer that `source` names.
pub fn tokenizer(source: &Source, hub: &LazyHub) -> Result<FoundTokenizer> {
    let path = match source {
        // A run has its tokenizer beside its model.
        Source::Path(path) if is_run(path) => model_folder(path),
        Source::Path(path) => path.clone(),
        Source::Hub(id) => {
            let hub = hub.get()?;
            let repo = RepoId::parse(RepoKind::Model, id)?;
            let listing = hub.list(&repo).with_context(|| format!("`tokenizer.source` = {id}"))?;
            let mut folder = None;
            for name in TOKENIZER_FILES {
                if listing.files.iter().any(|file| file.path == *name) {
                    folder = hub.download(&repo, name)?.parent().map(Path::to_owned);
                }
            }
            folder.with_context(|| format!("`tokenizer.source`: {id} has none of {TOKENIZER_FILES:?}"))?
        }
    };
    let tokenizer = TextTokenizer::load(&path).with_context(|| format!("`tokenizer.source` = {source}"))?;
    let folder = if path.is_dir() { path } else { path.parent().map(Path::to_owned).unwrap_or_default() };
    let files = TOKENIZER_FILES.iter().map(|name| folder.join(name)).filter(|path| path.is_file()).collect();
    Ok(FoundTokenizer { tokenizer, folder, files })
}

/// A hub file as the data module sees it.
struct HubBytes {
    file: RemoteFile,
    name: String,
}

impl ByteSource for HubBytes {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        Ok(self.file.read(range)?)
    }
}

/// The files of `sources` that `globs` choose (no globs: every data file), sorted and without repeats in each source.
pub fn source_files(sources: &[Source], globs: &[String], hub: &LazyHub, key: &str) -> Result<Vec<SourceFile>> {
    chosen_files(sources, globs, NamedFiles::Taken, hub, key)
}

/// As [`source_files`]; `named` says whether the globs choose among files that are sources themselves too.
pub fn chosen_files(
    sources: &[Source],
    globs: &[String],
    named: NamedFiles,
    hub: &LazyHub,
    key: &str,
) -> Result<Vec<SourceFile>> {
    let globs: Vec<Option<&str>> =
        if globs.is_empty() { vec![None] } else { globs.iter().map(|glob| Some(glob.as_str())).collect() };
    let mut files: Vec<SourceFile> = Vec::new();
    for source in sources {
        let context = || format!("`{key}` = {source}");
        let mut found = Vec::new();
        match source {
            Source::Path(path) => {
                for glob in &globs {
                    found.extend(local_files(path, *glob, named).with_context(context)?);
                }
            }
            Source::Hub(id) => {
                let hub = hub.get()?;
                let repo = RepoId::parse(RepoKind::Dataset, id)?;
                let listing = hub.list(&repo).with_context(context)?;
                let names: Vec<String> = listing.files.iter().map(|file| file.path.clone()).collect();
                for glob in &globs {
                    for name in select(&names, *glob).with_context(context)? {
                        let file = listing.files.iter().find(|file| file.path == name);
                        let file = file.with_context(|| format!("{id} has no file {name}"))?;
                        let bytes = HubBytes { file: hub.open(&repo, file), name: format!("{id}/{name}") };
                        found.push(SourceFile::detect(Arc::new(bytes))?);
                    }
                }
            }
        }
        found.sort_by(|a, b| a.bytes.name().cmp(b.bytes.name()));
        found.dedup_by(|a, b| a.bytes.name() == b.bytes.name());
        files.extend(found);
    }
    Ok(files)
}

/// Refuses `--files` beside a single file.
pub fn refuse_idle_globs(source: &Source, globs: &[String]) -> Result<(), ConfigError> {
    match source {
        Source::Path(path) if path.is_file() && !globs.is_empty() => {
            let path = path.display();
            let message =
                format!("it chooses among the files of a folder or data set, and {path} is one file: leave it out");
            Err(ConfigError::flag("--files", message))
        }
        _ => Ok(()),
    }
}

/// The column that texts are taken from where nothing else is said.
pub const DEFAULT_COLUMN: &str = "text";

/// Refuses a column of files without columns; `key` is what to name.
pub fn refuse_idle_column(files: &[SourceFile], column: &str, key: &str) -> Result<(), ConfigError> {
    let has_columns = files.iter().any(|file| matches!(file.kind, FileKind::Parquet | FileKind::Jsonl));
    if column == DEFAULT_COLUMN || has_columns || files.is_empty() {
        return Ok(());
    }
    let name = files[0].bytes.name();
    let message = format!("{name} has no columns: {column:?} is one of parquet or JSON Lines; leave it out");
    Err(ConfigError::flag(key, message))
}

/// The ids around a text, as the model's config.json names them.
pub fn text_marks(tokenizer: &TextTokenizer) -> TextMarks {
    TextMarks { begin: tokenizer.begin_of_text(), end: tokenizer.end_of_text() }
}
