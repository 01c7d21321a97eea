//! Weights in safetensors files: read into a flat storage and written from one, tensor by tensor.
//!
//! Reading goes through the file's header and then one tensor at a time, so a model is never twice in memory.

use crate::params::{FrozenTensor, Layout, Parameter};
use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Name of the single weights file, and of the index of a sharded one.
pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// Name of a head of its own, in both architectures.
pub const HEAD: &str = "lm_head.weight";

/// The weight files named by an index file's text, without repeats, in alphabetical order.
pub fn files_of_index(text: &str) -> Result<Vec<String>> {
    let index: serde_json::Value = serde_json::from_str(text).context("the index is not valid JSON")?;
    let map = index.get("weight_map").and_then(|map| map.as_object()).context("the index has no `weight_map`")?;
    let mut files: Vec<String> = Vec::new();
    for (name, file) in map {
        let file = file.as_str().with_context(|| format!("`weight_map` gives no file for {name}"))?;
        ensure!(!file.contains('/') && !file.contains('\\') && file != "..", "`weight_map` names the file {file:?}");
        files.push(file.to_owned());
    }
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

/// The weight files of a local folder.
pub fn files_of_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    if single.is_file() {
        return Ok(vec![single]);
    }
    if index.is_file() {
        let text = std::fs::read_to_string(&index).with_context(|| format!("cannot read {}", index.display()))?;
        let names = files_of_index(&text).with_context(|| format!("in {}", index.display()))?;
        return Ok(names.iter().map(|name| folder.join(name)).collect());
    }
    let pickled = folder.join("pytorch_model.bin").is_file();
    let hint =
        if pickled { " (pytorch_model.bin is a pickle, which vrtrain never opens: convert it first)" } else { "" };
    bail!("{} has neither {SINGLE} nor {INDEX}{hint}", folder.display())
}

/// One tensor's place in a file.
#[derive(Clone, Debug)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    file: PathBuf,
    start: u64,
    bytes: usize,
}

/// Reads the headers of `files`: name -> place. The whole of every file must be there.
pub fn headers(files: &[PathBuf]) -> Result<BTreeMap<String, Stored>> {
    let mut stored = BTreeMap::new();
    for path in files {
        let (metadata, data_start) = header(path).with_context(|| format!("cannot read {}", path.display()))?;
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let place = Stored {
                dtype: info.dtype,
                shape: info.shape.clone(),
                file: path.clone(),
                start: data_start + start as u64,
                bytes: end - start,
            };
            if let Some(other) = stored.insert(name.clone(), place) {
                bail!("{name} is in {} and in {}", other.file.display(), path.display());
            }
        }
    }
    Ok(stored)
}

fn header(path: &Path) -> Result<(Metadata, u64)> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut prefix = [0u8; 8];
    file.read_exact(&mut prefix).context("the file is too short for a safetensors header")?;
    let header_len = u64::from_le_bytes(prefix);
    ensure!(
        header_len < size && header_len < 100 << 20,
        "this is not a safetensors file (its header would be {header_len} bytes)"
    );
    let mut buffer = vec![0u8; header_len as usize];
    file.read_exact(&mut buffer).context("the header is cut off")?;
    // The library's own reader wants the whole file in memory; the header alone says where each tensor lies.
    let metadata: Metadata = serde_json::from_slice(&buffer).context("this is not a valid safetensors header")?;
    let data_start = 8 + header_len;
    let data_len = metadata.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0) as u64;
    ensure!(
        size == data_start + data_len,
        "the file has {size} bytes but its header describes {}: it is torn or still being written",
        data_start + data_len
    );
    Ok((metadata, data_start))
}

/// Reads one tensor's bytes.
fn read_bytes(name: &str, stored: &Stored) -> Result<Vec<u8>> {
    let mut file = File::open(&stored.file).with_context(|| format!("cannot open {}", stored.file.display()))?;
    file.seek(SeekFrom::Start(stored.start))?;
    let mut bytes = vec![0u8; stored.bytes];
    file.read_exact(&mut bytes).with_context(|| format!("cannot read {name} from {}", stored.file.display()))?;
    Ok(bytes)
}

/// Reads one tensor as it is stored, without widening it; what is not finite is refused.
pub fn read_as_stored(name: &str, stored: &Stored) -> Result<FrozenTensor> {
    let expected = stored.shape.iter().product::<usize>() * 2;
    let tensor = match stored.dtype {
        Dtype::BF16 | Dtype::F16 => {
            let bytes = read_bytes(name, stored)?;
            ensure!(bytes.len() == expected, "{name} has {} bytes, expected {expected}", bytes.len());
            let halves = bytes.as_chunks().0.iter();
            if stored.dtype == Dtype::BF16 {
                FrozenTensor::Bf16(halves.map(|bytes| bf16::from_le_bytes(*bytes)).collect())
            } else {
                FrozenTensor::F16(halves.map(|bytes| f16::from_le_bytes(*bytes)).collect())
            }
        }
        _ => {
            let mut numbers = vec![0.0; stored.shape.iter().product()];
            read(name, stored, &mut numbers)?;
            return Ok(FrozenTensor::F32(numbers));
        }
    };
    let place = match &tensor {
        FrozenTensor::Bf16(numbers) => numbers.iter().position(|x| !x.is_finite()),
        FrozenTensor::F16(numbers) => numbers.iter().position(|x| !x.is_finite()),
        FrozenTensor::F32(_) | FrozenTensor::Nf4(_) => None,
    };
    match place {
        Some(place) => {
            bail!("{name} in {} is not finite at element {place}: these weights are poisoned", stored.file.display())
        }
        None => Ok(tensor),
    }
}

/// Reads one tensor as f32 into `out` and refuses what is not finite.
pub fn read(name: &str, stored: &Stored, out: &mut [f32]) -> Result<()> {
    let bytes = read_bytes(name, stored)?;
    let numbers = |width: usize| -> Result<()> {
        ensure!(bytes.len() == width * out.len(), "{name} has {} bytes, expected {}", bytes.len(), width * out.len());
        Ok(())
    };
    match stored.dtype {
        Dtype::F32 => {
            numbers(4)?;
            let chunks = bytes.chunks_exact(4).zip(out.iter_mut());
            chunks.for_each(|(b, x)| *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
        Dtype::F64 => {
            numbers(8)?;
            let chunks = bytes.chunks_exact(8).zip(out.iter_mut());
            chunks.for_each(|(b, x)| *x = f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32);
        }
        Dtype::BF16 => {
            numbers(2)?;
            bytes
                .chunks_exact(2)
                .zip(out.iter_mut())
                .for_each(|(b, x)| *x = bf16::from_le_bytes([b[0], b[1]]).to_f32());
        }
        Dtype::F16 => {
            numbers(2)?;
            bytes.chunks_exact(2).zip(out.iter_mut()).for_each(|(b, x)| *x = f16::from_le_bytes([b[0], b[1]]).to_f32());
        }
        other => bail!("{name} in {} is {other:?}; weights must be f32, bf16, f16 or f64", stored.file.display()),
    }
    if let Some(place) = out.iter().position(|x| !x.is_finite()) {
        bail!(
            "{name} in {} holds {} at element {place}: these weights are poisoned",
            stored.file.display(),
            out[place]
        );
    }
    Ok(())
}

/// Fills `weights` (a flat storage of `layout`) from `stored`, which must hold every parameter in its shape.
pub fn load(layout: &Layout, stored: &BTreeMap<String, Stored>, weights: &mut [f32]) -> Result<()> {
    each(layout, stored, |parameter, place| read(&parameter.name, place, &mut weights[parameter.range()]))
}

/// Calls `task` with every parameter and its place, in the layout's order; `stored` must hold all in their shapes.
fn each(
    layout: &Layout,
    stored: &BTreeMap<String, Stored>,
    mut task: impl FnMut(&Parameter, &Stored) -> Result<()>,
) -> Result<()> {
    let missing: Vec<&str> =
        layout.parameters().iter().map(|p| p.name.as_str()).filter(|name| !stored.contains_key(*name)).collect();
    if let Some(first) = missing.first() {
        bail!(
            "the weights lack {first} (and {} more of the model's {} parameters)",
            missing.len() - 1,
            layout.parameters().len()
        );
    }
    for parameter in layout.parameters() {
        let place = &stored[&parameter.name];
        ensure!(
            place.shape == parameter.shape,
            "{} in {} has shape {:?}, the model expects {:?}: this is a checkpoint of another model",
            parameter.name,
            place.file.display(),
            place.shape,
            parameter.shape
        );
        task(parameter, place)?;
    }
    Ok(())
}

/// A complete model's tensors by the names of its layout, and the parameter that the head is tied to, if it is.
pub struct StoredModel {
    pub tensors: BTreeMap<String, Stored>,
    pub tied_to: Option<usize>,
}

/// Calls `task` with every parameter of a complete model and its place: what is left over is refused, and where the head
/// is tied, a `lm_head.weight` in the files must equal the parameter that it is tied to.
pub fn each_exactly(
    layout: &Layout,
    model: StoredModel,
    task: impl FnMut(&Parameter, &Stored) -> Result<()>,
) -> Result<()> {
    let StoredModel { tensors: mut stored, tied_to } = model;
    let tied = tied_to.and_then(|index| stored.remove(HEAD).map(|head| (&layout.parameters()[index], head)));
    let foreign: Vec<&str> = stored.keys().map(String::as_str).filter(|name| layout.index_of(name).is_none()).collect();
    if let Some(first) = foreign.first() {
        bail!("the weights hold {first} (and {} more), which is no parameter of this model", foreign.len() - 1);
    }
    each(layout, &stored, task)?;
    let Some((embedding, place)) = tied else { return Ok(()) };
    ensure!(place.shape == embedding.shape, "{HEAD} has shape {:?}, expected {:?}", place.shape, embedding.shape);
    let [mut head, mut table] = [(); 2].map(|()| vec![0.0; embedding.len]);
    read(HEAD, &place, &mut head)?;
    read(&embedding.name, &stored[&embedding.name], &mut table)?;
    ensure!(
        head == table,
        "the config says that the head is tied, but {HEAD} differs from {}; set \"tie_word_embeddings\": false in \
         config.json if the head is one of its own",
        embedding.name
    );
    Ok(())
}

/// What stands before the names in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamePrefix {
    /// Nothing, as in OpenAI's GPT-2 files.
    None,
    /// `transformer.` before every name but the head's.
    Transformer,
}

/// A parameter's name in a file.
pub(super) fn prefixed(prefix: NamePrefix, name: &str) -> String {
    match prefix {
        NamePrefix::Transformer if name != HEAD => format!("transformer.{name}"),
        _ => name.to_owned(),
    }
}

/// Writes every parameter of `layout` under its name, with the metadata that transformers expects.
pub fn write(path: &Path, layout: &Layout, weights: &[f32], prefix: NamePrefix) -> Result<()> {
    let tensors = layout.parameters().iter().map(|parameter| {
        let bytes: &[u8] = bytemuck::cast_slice(&weights[parameter.range()]);
        Ok((prefixed(prefix, &parameter.name), TensorView::new(Dtype::F32, parameter.shape.clone(), bytes)?))
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::ParameterSpec;

    fn layout() -> Layout {
        let spec = |name: &str, shape: &[usize]| ParameterSpec { name: name.into(), shape: shape.into(), decays: true };
        Layout::new(vec![spec("a", &[2, 3]), spec("b", &[5])])
    }

    #[test]
    fn weights_written_and_read_again_are_the_same_bits() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (layout, path) = (layout(), folder.path().join(SINGLE));
        let mut weights = vec![0.0f32; layout.len()];
        layout
            .parameters()
            .iter()
            .for_each(|p| weights[p.range()].iter_mut().enumerate().for_each(|(i, x)| *x = i as f32 / 7.0));
        write(&path, &layout, &weights, NamePrefix::None)?;
        let mut again = vec![0.0f32; layout.len()];
        load(&layout, &headers(&files_of_folder(folder.path())?)?, &mut again)?;
        assert_eq!(weights, again);
        Ok(())
    }

    #[test]
    fn torn_poisoned_and_foreign_files_are_refused_by_name() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (layout, path) = (layout(), folder.path().join(SINGLE));
        let mut weights = vec![0.5f32; layout.len()];
        write(&path, &layout, &weights, NamePrefix::None)?;
        let whole = std::fs::read(&path)?;
        std::fs::write(&path, &whole[..whole.len() - 3])?;
        assert!(format!("{:#}", headers(std::slice::from_ref(&path)).unwrap_err()).contains("torn"));
        std::fs::write(&path, b"<html>not weights</html>")?;
        assert!(headers(std::slice::from_ref(&path)).is_err());
        weights[layout.parameters()[1].offset + 2] = f32::NAN;
        write(&path, &layout, &weights, NamePrefix::None)?;
        let error = load(&layout, &headers(std::slice::from_ref(&path))?, &mut weights).unwrap_err().to_string();
        assert!(error.contains("b in") && error.contains("NaN at element 2"), "{error}");
        Ok(())
    }

    #[test]
    fn an_index_names_its_shards_once_and_never_leaves_the_folder() -> Result<()> {
        let text =
            r#"{"weight_map": {"x": "model-2.safetensors", "y": "model-1.safetensors", "z": "model-2.safetensors"}}"#;
        assert_eq!(files_of_index(text)?, ["model-1.safetensors", "model-2.safetensors"]);
        assert!(files_of_index(r#"{"weight_map": {"x": "../secret"}}"#).is_err());
        Ok(())
    }
}
