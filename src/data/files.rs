//! Which files a source is made of: the kind of each, and the choice of files in a folder or a hub listing.

use super::bytes::{ByteSource, LocalFile};
use anyhow::{Context, Result, bail, ensure};
use globset::{GlobBuilder, GlobMatcher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The formats that training data come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Columns; the text column's rows are documents.
    Parquet,
    /// One JSON object a line; the text field is a document.
    Jsonl,
    /// UTF-8 text, one document.
    Text,
    /// Token ids as raw little-endian u16, as nanoGPT writes them.
    NanoGptBin,
    /// Token ids after a header of 256 i32, as llm.c writes them (version 1: u16, version 7: u32).
    LlmcBin,
}

/// Magic numbers of llm.c's token files: GPT-2 (u16) and LLaMA 3 (u32).
pub(super) const LLMC_MAGIC_U16: u32 = 20240520;
pub(super) const LLMC_MAGIC_U32: u32 = 20240801;

/// Extensions that a folder's files are chosen by where no glob is given.
const DATA_EXTENSIONS: [&str; 5] = ["parquet", "jsonl", "ndjson", "txt", "bin"];

/// A file and its format.
#[derive(Clone)]
pub struct SourceFile {
    pub bytes: Arc<dyn ByteSource>,
    pub kind: FileKind,
}

impl SourceFile {
    /// Tells the format from the name and from the first and last bytes.
    pub fn detect(bytes: Arc<dyn ByteSource>) -> Result<Self> {
        let (name, len) = (bytes.name().to_string(), bytes.len());
        ensure!(len > 0, "the data file {name} is empty");
        let kind = match extension(&name).as_deref() {
            Some("parquet" | "pq") => FileKind::Parquet,
            Some("jsonl" | "ndjson") => FileKind::Jsonl,
            Some("json") => match first_visible_byte(&*bytes)? {
                Some(b'{') => FileKind::Jsonl,
                _ => bail!("{name} is not JSON Lines (an object a line): convert it, or name other files"),
            },
            Some("txt" | "text" | "md") => FileKind::Text,
            Some("bin") if llmc_magic(&*bytes)?.is_some() => FileKind::LlmcBin,
            Some("bin") => FileKind::NanoGptBin,
            Some("gz" | "zst" | "bz2" | "xz" | "zip") => {
                bail!("{name} is a compressed file: unpack it first (parquet compresses inside)")
            }
            _ if len >= 4 && bytes.read(0..4)? == *b"PAR1" => FileKind::Parquet,
            _ if llmc_magic(&*bytes)?.is_some() => FileKind::LlmcBin,
            _ => bail!("the format of {name} is not known: name it .parquet, .jsonl, .txt or .bin"),
        };
        Ok(Self { bytes, kind })
    }

    /// Opens a file on disk and tells its format.
    pub fn local(path: &Path) -> Result<Self> {
        Self::detect(Arc::new(LocalFile::open(path)?))
    }
}

/// The llm.c magic number that a file begins with, if it is one.
fn llmc_magic(bytes: &dyn ByteSource) -> Result<Option<u32>> {
    if bytes.len() < 4 {
        return Ok(None);
    }
    let head = bytes.read(0..4)?;
    let magic = head.try_into().map(u32::from_le_bytes).ok();
    Ok(magic.filter(|magic| [LLMC_MAGIC_U16, LLMC_MAGIC_U32].contains(magic)))
}

fn first_visible_byte(bytes: &dyn ByteSource) -> Result<Option<u8>> {
    let head = bytes.read(0..bytes.len().min(4096))?;
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head);
    Ok(head.iter().copied().find(|byte| !byte.is_ascii_whitespace()))
}

pub(super) fn extension(name: &str) -> Option<String> {
    Path::new(name).extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase)
}

/// What a glob says of a file that a source names itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedFiles {
    /// Nothing: whoever names a file wants it.
    Taken,
    /// Whether it is taken, as of a folder's files.
    Chosen,
}

/// The files of `source` (a file, or a folder searched to any depth), sorted by name; `glob` chooses among a folder's,
/// and `named` says whether it does of `source` itself.
pub fn local_files(source: &Path, glob: Option<&str>, named: NamedFiles) -> Result<Vec<SourceFile>> {
    let metadata = std::fs::metadata(source).with_context(|| format!("cannot find the data {}", source.display()))?;
    if metadata.is_file() {
        let taken = match glob {
            // The folders of the glob are another source's.
            Some(glob) if named == NamedFiles::Chosen => {
                let name = source.file_name().unwrap_or_default();
                matcher(glob.rsplit('/').next().unwrap_or(glob))?.is_match(name)
            }
            _ => true,
        };
        return if taken { Ok(vec![SourceFile::local(source)?]) } else { Ok(Vec::new()) };
    }
    let mut names = Vec::new();
    list(source, source, &mut Vec::new(), &mut names)?;
    let chosen = select(&names, glob).with_context(|| format!("choosing data files in {}", source.display()))?;
    chosen.iter().map(|name| SourceFile::local(&source.join(name))).collect()
}

/// Adds the files below `folder` to `names`, relative to `root`, with `/` between the parts. Hidden ones are left out.
///
/// A link to a folder that is being listed already (`above`: where each really is) leads in a circle and is not followed.
fn list(root: &Path, folder: &Path, above: &mut Vec<PathBuf>, names: &mut Vec<String>) -> Result<()> {
    let failed = || format!("cannot list the folder {}", folder.display());
    let place = folder.canonicalize().with_context(failed)?;
    if above.contains(&place) {
        return Ok(());
    }
    above.push(place);
    for entry in std::fs::read_dir(folder).with_context(failed)? {
        let path: PathBuf = entry.with_context(failed)?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            list(root, &path, above, names)?;
        } else {
            let relative = path.strip_prefix(root)?;
            let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
            names.push(parts.join("/"));
        }
    }
    above.pop();
    Ok(())
}

/// Chooses data files among relative `names` (a folder's or a hub repository's) and sorts them.
///
/// A glob without `/` is matched with the last part of the name, any other with the whole name; `*` does not cross `/`
/// and `**` does. Without a glob the files with the extensions parquet, jsonl, ndjson, txt and bin are taken, which
/// must then be of one kind.
pub fn select(names: &[String], glob: Option<&str>) -> Result<Vec<String>> {
    let mut chosen: Vec<String> = match glob {
        Some(pattern) => {
            let matcher = matcher(pattern)?;
            let last_part_only = !pattern.contains('/');
            let subject =
                |name: &str| if last_part_only { name.rsplit('/').next() } else { Some(name) }.map(String::from);
            names.iter().filter(|name| subject(name).is_some_and(|name| matcher.is_match(name))).cloned().collect()
        }
        None => {
            let known = |name: &&String| extension(name).is_some_and(|e| DATA_EXTENSIONS.contains(&e.as_str()));
            names.iter().filter(known).cloned().collect()
        }
    };
    chosen.sort_unstable();
    if chosen.is_empty() {
        let wanted =
            glob.map_or_else(|| format!("has an extension of {DATA_EXTENSIONS:?}"), |g| format!("matches {g}"));
        bail!("none of the {} files {wanted}{}", names.len(), examples(names));
    }
    if glob.is_none() {
        let mut kinds: Vec<String> = chosen.iter().filter_map(|name| extension(name)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        ensure!(
            kinds.len() == 1,
            "there are files of several kinds ({}): choose with files = \"*.{}\"",
            kinds.join(", "),
            kinds[0]
        );
    }
    Ok(chosen)
}

fn matcher(pattern: &str) -> Result<GlobMatcher> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    Ok(glob.with_context(|| format!("files = \"{pattern}\" is not a valid glob"))?.compile_matcher())
}

fn examples(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [only] => format!(" (there is {only})"),
        [first, second, ..] => format!(" (there are {first}, {second}, ..)"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryFile;
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn a_glob_matches_the_whole_name_or_the_last_part_and_the_result_is_sorted() -> Result<()> {
        let all = names(&["README.md", "sample/10BT/001.parquet", "sample/10BT/000.parquet", "data/x.parquet"]);
        assert_eq!(
            select(&all, Some("sample/10BT/*.parquet"))?,
            ["sample/10BT/000.parquet", "sample/10BT/001.parquet"]
        );
        assert_eq!(select(&all, Some("00*.parquet"))?, ["sample/10BT/000.parquet", "sample/10BT/001.parquet"]);
        assert!(select(&all, Some("sample/*")).is_err(), "* must not cross /");
        assert_eq!(select(&all, Some("**/*.parquet"))?.len(), 3);
        Ok(())
    }

    #[test]
    fn without_a_glob_data_extensions_are_taken_and_several_kinds_are_refused() -> Result<()> {
        assert_eq!(select(&names(&["README.md", "b.jsonl", "a.jsonl", "config.json"]), None)?, ["a.jsonl", "b.jsonl"]);
        let error = select(&names(&["a.parquet", "b.bin"]), None).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("several kinds (bin, parquet)")));
        let error = select(&names(&["README.md"]), None).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("README.md")));
        Ok(())
    }

    #[test]
    fn the_kind_follows_from_name_and_content_and_unknown_ones_are_refused() -> Result<()> {
        let kind = |name: &str, bytes: &[u8]| {
            SourceFile::detect(Arc::new(MemoryFile::new(name, bytes.to_vec()))).map(|f| f.kind)
        };
        assert_eq!(kind("a.PARQUET", b"x")?, FileKind::Parquet);
        assert_eq!(kind("no-extension", b"PAR1xxxx")?, FileKind::Parquet);
        assert_eq!(kind("a.json", b"\n {\"text\": 1}")?, FileKind::Jsonl);
        assert_eq!(kind("a.bin", &[1, 0])?, FileKind::NanoGptBin);
        assert_eq!(kind("a.bin", &LLMC_MAGIC_U32.to_le_bytes())?, FileKind::LlmcBin);
        for (name, bytes) in [("a.json", &b"[1]"[..]), ("a.txt", b""), ("a.jsonl.gz", b"x"), ("a.csv", b"a,b")] {
            let error = kind(name, bytes).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(name), "{name}: {error}");
        }
        Ok(())
    }
}
