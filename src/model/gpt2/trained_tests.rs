//! A trained GPT-2 (it sorts digits) against PyTorch's own activations.

use super::twin::{self, BlockTensors};
use super::*;
use crate::config::Recompute;
use crate::model::twin::Places;
use crate::model::{Decoder, Documents, Extent, ModelShape, Prompt, weights};
use crate::ops::product::Precision;
use crate::params::Layout;
use anyhow::{Context, Result};
use base64::Engine as _;
use candle_core::{DType, Device, Tensor};
use std::path::Path;
use std::sync::Arc;

const ROWS: usize = 3;
const TIME: usize = 11;

struct Trained {
    config: Gpt2Config,
    layout: Arc<Layout>,
    weights: Vec<f32>,
    partials: serde_json::Value,
}

impl Trained {
    fn load() -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt-nano-sort");
        let read = |name: &str| -> Result<serde_json::Value> {
            Ok(serde_json::from_str(&std::fs::read_to_string(folder.join(name))?)?)
        };
        let config = Gpt2Config::from_hugging_face(&read("config.json")?).map_err(anyhow::Error::msg)?;
        let layout = Arc::new(Layout::new(config.parameter_specs()));
        let mut numbers = vec![0.0; layout.len()];
        ModelShape::Gpt2(config.clone()).load(&layout, &weights::files_of_folder(&folder)?, &mut numbers)?;
        Ok(Self { config, layout, weights: numbers, partials: read("gpt-nano-sort-t0-partials.json")? })
    }

    /// PyTorch's activation `name`.
    fn expected(&self, name: &str) -> Result<Vec<f32>> {
        let data = self.partials[name]["data"].as_str().with_context(|| format!("no {name}"))?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(data)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    fn ids(&self) -> Result<Vec<u32>> {
        Ok(self.expected("idx")?.into_iter().map(|id| id as u32).collect())
    }

    fn tensor(&self, index: usize) -> Result<Tensor> {
        let parameter = &self.layout.parameters()[index];
        Ok(Tensor::from_slice(&self.weights[parameter.range()], parameter.shape.as_slice(), &Device::Cpu)?)
    }
}

fn assert_close(name: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{name}: {worst}");
}

#[test]
fn every_block_of_the_twin_gives_pytorchs_activations() -> Result<()> {
    let trained = Trained::load()?;
    let parameters = trained.config.parameters(&trained.layout);
    let pair =
        |weight: usize, bias: usize| -> Result<[Tensor; 2]> { Ok([trained.tensor(weight)?, trained.tensor(bias)?]) };
    let ids = Tensor::from_vec(trained.ids()?, (ROWS, TIME), &Device::Cpu)?;
    let (tokens, positions) =
        (trained.tensor(parameters.token_embedding)?, trained.tensor(parameters.position_embedding)?);
    let extent = Extent { rows: ROWS, time: TIME };
    let places = Places::new(Documents::Whole, extent, DType::F32, &Device::Cpu)?;
    let mut x = twin::embed(&tokens, &positions, &ids, &places)?;
    let check = |name: &str, x: &Tensor| -> Result<()> {
        assert_close(name, &x.flatten_all()?.to_vec1::<f32>()?, &trained.expected(name)?);
        Ok(())
    };
    check("x", &x)?;
    for (layer, block) in parameters.blocks.iter().enumerate() {
        let tensors: Vec<Tensor> = block.all().into_iter().map(|index| trained.tensor(index)).collect::<Result<_>>()?;
        let tensors = BlockTensors::from(std::array::from_fn(|place| tensors[place].clone()));
        x = twin::block(&trained.config, &places, &tensors, &x)?;
        check(&format!("block{layer}"), &x)?;
    }
    let norm = pair(parameters.norm_final.weight, parameters.norm_final.bias)?;
    check("lm_head", &twin::logits(&trained.config, &norm, &trained.tensor(parameters.head)?, &x)?)
}

#[test]
fn the_fast_path_gives_pytorchs_logits_and_sorts_all_729_inputs() -> Result<()> {
    let trained = Trained::load()?;
    let mut model = Gpt2Cpu::new(trained.config.clone(), Arc::clone(&trained.layout), Recompute::None, Precision::F32);
    assert_close("ln_f", model.hidden(trained.weights[..].into(), &trained.ids()?, ROWS)?, &trained.expected("ln_f")?);
    assert_close(
        "lm_head",
        &model.logits(trained.weights[..].into(), &trained.ids()?, ROWS)?,
        &trained.expected("lm_head")?,
    );

    let mut model = Decoder::new(&ModelShape::Gpt2(trained.config.clone()), &trained.layout);
    for number in 0..729u32 {
        let digits: Vec<u32> = (0..6).map(|place| number / 3u32.pow(place) % 3).collect();
        let mut cache = model.cache(1, TIME);
        let mut logits = vec![0.0; 3];
        let prompt = Prompt { sequence: 0, tokens: &digits };
        model.prefill(&trained.weights[..], &mut cache, &[prompt], &mut logits)?;
        let mut sorted = Vec::new();
        for _ in 0..6 {
            let next = (0..3u32).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])).unwrap_or(0);
            sorted.push(next);
            if sorted.len() < 6 {
                model.decode(&trained.weights[..], &mut cache, &[next], &mut logits)?;
            }
        }
        let mut expected = digits.clone();
        expected.sort_unstable();
        assert_eq!(sorted, expected, "{digits:?}");
    }
    Ok(())
}
