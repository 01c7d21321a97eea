//! Hugging Face LLaMA weights: which names they may carry, and what is ignored.

use super::LlamaConfig;
use crate::model::Head;
use crate::model::weights::{self, HEAD, Stored, StoredModel};
use crate::params::Layout;
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Finds every parameter in weight files.
///
/// Names with and without the prefix `model.` are accepted, the rotation's frequencies that old files carry are passed
/// over, and a head in the file of a tied model must equal the token embedding.
///
/// # Errors
/// When a file is torn or holds a tensor twice.
pub fn stored(config: &LlamaConfig, layout: &Layout, files: &[PathBuf]) -> Result<StoredModel> {
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    for (name, place) in weights::headers(files)? {
        if name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        let full = if name == HEAD || name.starts_with("model.") { name.clone() } else { format!("model.{name}") };
        ensure!(tensors.insert(full, place).is_none(), "the weights hold {name} twice, with and without a prefix");
    }
    let tied_to = (config.head == Head::Tied).then(|| config.parameters(layout).token_embedding);
    Ok(StoredModel { tensors, tied_to })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelShape;
    use crate::model::llama::SpecialIds;
    use crate::ops::rotary::Scaling;
    use half::f16;
    use safetensors::tensor::{Dtype, TensorView};
    use std::path::Path;

    fn config(head: Head) -> LlamaConfig {
        LlamaConfig {
            n_layer: 1,
            n_head: 2,
            n_kv_head: 1,
            head_dim: 4,
            n_embd: 8,
            n_inner: 12,
            n_positions: 16,
            vocab_size: 5,
            rms_norm_epsilon: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: Scaling::None,
            head,
            special_ids: SpecialIds::default(),
        }
    }

    fn load(config: &LlamaConfig, layout: &Layout, files: &[PathBuf], out: &mut [f32]) -> Result<()> {
        ModelShape::Llama(config.clone()).load(layout, files, out)
    }

    /// Writes tensors (name, shape, numbers) as f16.
    fn write(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Result<()> {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, numbers)| numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect())
            .collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), bytes)| Ok((name.clone(), TensorView::new(Dtype::F16, shape.clone(), bytes)?)));
        Ok(safetensors::serialize_to_file(views.collect::<Result<Vec<_>>>()?, None, path)?)
    }

    /// Every parameter of `layout` filled with its place in the table, named as `name` says.
    fn tensors(layout: &Layout, name: impl Fn(&str) -> String) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let parameters = layout.parameters().iter().enumerate();
        parameters.map(|(place, p)| (name(&p.name), p.shape.clone(), vec![place as f32; p.len])).collect()
    }

    #[test]
    fn shards_of_f16_without_prefix_and_with_the_rotations_buffers_are_read() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let config = config(Head::Untied);
        let layout = Layout::new(config.parameter_specs());
        let mut tensors = tensors(&layout, |name| name.strip_prefix("model.").unwrap_or(name).to_owned());
        tensors.push(("layers.0.self_attn.rotary_emb.inv_freq".into(), vec![2], vec![1.0, 0.5]));
        let files = [folder.path().join("a.safetensors"), folder.path().join("b.safetensors")];
        let (first, second) = tensors.split_at(4);
        write(&files[0], first)?;
        write(&files[1], second)?;
        let mut weights = vec![0.0; layout.len()];
        load(&config, &layout, &files, &mut weights)?;
        for (place, parameter) in layout.parameters().iter().enumerate() {
            assert!(weights[parameter.range()].iter().all(|&x| x == place as f32), "{}", parameter.name);
        }
        let error = load(&config, &layout, &files[..1], &mut weights).expect_err("half of it").to_string();
        assert!(error.contains("lack"), "{error}");
        Ok(())
    }

    #[test]
    fn a_head_in_the_file_of_a_tied_model_must_be_the_embedding() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let config = config(Head::Tied);
        let layout = Layout::new(config.parameter_specs());
        let mut tensors = tensors(&layout, str::to_owned);
        let (_, shape, embedding) = tensors[0].clone();
        tensors.push((HEAD.into(), shape, embedding));
        let files = [folder.path().join("a.safetensors")];
        let mut weights = vec![0.0; layout.len()];
        write(&files[0], &tensors)?;
        load(&config, &layout, &files, &mut weights)?;
        if let Some((_, _, head)) = tensors.last_mut() {
            head[7] += 1.0;
        }
        write(&files[0], &tensors)?;
        let error = load(&config, &layout, &files, &mut weights).expect_err("another head").to_string();
        assert!(error.contains(HEAD) && error.contains("model.embed_tokens.weight"), "{error}");
        tensors.pop();
        tensors.push(("model.layers.0.self_attn.q_proj.bias".into(), vec![8], vec![0.0; 8]));
        write(&files[0], &tensors)?;
        let error = load(&config, &layout, &files, &mut weights).expect_err("a bias").to_string();
        assert!(error.contains("q_proj.bias"), "{error}");
        Ok(())
    }
}
