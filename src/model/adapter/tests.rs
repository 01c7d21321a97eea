//! Adapters against PEFT's numbers (tests/fixtures/peft/make.py makes them), on a base as it is and in bitsandbytes' NF4.

use super::{AdapterSettings, Scaling, initialize, merge, peft};
use crate::config::{Quantization, Recompute};
use crate::model::weights::{self, NamePrefix};
use crate::model::{BaseSource, Batch, Decoder, Documents, Draw, Engine, Labels, ModelShape, Prompt, load_base};
use crate::ops::product::Precision;
use crate::params::{Adaptation, FrozenTensor, Layout, ParameterStore, slice};
use anyhow::{Context, Result};
use candle_core::Device;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const ROWS: usize = 2;

/// A model of the fixture: its folder, shape, adapters' settings, and what PEFT computed.
struct Fixture {
    folder: PathBuf,
    shape: ModelShape,
    settings: AdapterSettings,
    expected: Vec<u8>,
}

fn fixtures() -> Result<[Fixture; 2]> {
    let open = |name: &str| -> Result<Fixture> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(name);
        let config = serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?;
        let shape = ModelShape::from_hugging_face(&config).map_err(anyhow::Error::msg)?;
        let settings = peft::read_config_file(&folder.join(peft::CONFIG))?;
        let expected = std::fs::read(folder.join("expected.safetensors"))?;
        Ok(Fixture { folder, shape, settings, expected })
    };
    Ok([open("gpt2")?, open("llama")?])
}

impl Fixture {
    fn numbers(&self, name: &str) -> Result<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.expected)?;
        let tensor = file.tensor(name).with_context(|| format!("no {name} in the fixture"))?;
        Ok(tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    fn ids(&self, name: &str) -> Result<Vec<u32>> {
        Ok(self.numbers(name)?.iter().map(|x| x.to_bits()).collect())
    }

    fn layout(&self) -> Result<Arc<Layout>> {
        Ok(Arc::new(Layout::new(self.shape.adapter_specs(&self.settings).map_err(anyhow::Error::msg)?)))
    }

    /// A store with PEFT's adapters beside the fixture's base.
    fn store(&self, quantization: Quantization, dropout: f64) -> Result<ParameterStore> {
        let files = weights::files_of_folder(&self.folder)?;
        let adaptation = Adaptation { scaling: self.settings.factor(), dropout };
        let frozen = load_base(&self.shape, BaseSource::Files(&files), quantization, adaptation)?;
        let layout = self.layout()?;
        let mut numbers = vec![0.0; layout.len()];
        peft::load(&self.folder.join(peft::WEIGHTS), &layout, &mut numbers)?;
        let mut store = ParameterStore::new(layout, &Device::Cpu)?.beside(Some(Arc::new(frozen)));
        store.set_weights(numbers)?;
        Ok(store)
    }

    fn engine(&self, layout: &Arc<Layout>, recompute: Recompute) -> Engine {
        Engine::new(&self.shape, layout, &Device::Cpu, recompute, Precision::F32)
    }
}

fn near(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    for (place, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + largest), "{what}[{place}] is {a}, PEFT says {b}");
    }
}

#[test]
fn logits_loss_and_every_gradient_are_pefts_on_a_plain_and_on_a_quantized_base() -> Result<()> {
    for fixture in fixtures()? {
        let (inputs, targets) = (fixture.ids("inputs")?, fixture.ids("targets")?);
        let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
        for (quantization, prefix) in [(Quantization::None, ""), (Quantization::Nf4, "nf4.")] {
            let mut store = fixture.store(quantization, 0.0)?;
            let layout = Arc::clone(store.layout());
            let what = |name: &str| format!("{prefix}{name} of {:?}", fixture.shape.architecture());
            let logits =
                store.read(|weights| Decoder::new(&fixture.shape, &layout).logits(weights, &inputs, ROWS))??;
            near(&what("logits"), &logits, &fixture.numbers(&format!("{prefix}logits"))?, 1e-5);
            for recompute in [Recompute::None, Recompute::Block] {
                let mut engine = fixture.engine(&layout, recompute);
                store.start_gradients();
                let loss = engine.gradients(&mut store, batch, Labels::Data)?;
                near(&what("loss"), &[loss.sum as f32], &fixture.numbers(&format!("{prefix}loss"))?, 1e-5);
                assert_eq!(engine.loss(&store, batch)?, loss);
                assert!(store.without_gradient().is_empty());
                for (index, parameter) in layout.parameters().iter().enumerate() {
                    let gradient = slice(&store.view(store.gradients(), index)?, <[f32]>::to_vec)?;
                    let expected = fixture.numbers(&format!("{prefix}gradient.{}", parameter.name))?;
                    near(&what(&parameter.name), &gradient, &expected, 2e-5);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn fresh_adapters_leave_the_models_own_logits_bit_for_bit() -> Result<()> {
    for fixture in fixtures()? {
        let files = weights::files_of_folder(&fixture.folder)?;
        let own = Layout::new(fixture.shape.parameter_specs());
        let mut plain = vec![0.0; own.len()];
        fixture.shape.load(&own, &files, &mut plain)?;
        let ids = fixture.ids("inputs")?;
        let expected = Decoder::new(&fixture.shape, &Arc::new(own)).logits(&plain[..], &ids, ROWS)?;
        let mut store = fixture.store(Quantization::None, 0.5)?;
        let layout = Arc::clone(store.layout());
        let mut fresh = vec![0.0; layout.len()];
        initialize(&layout, 3, &mut fresh);
        assert!(fresh.iter().any(|x| *x != 0.0), "A is not zero");
        store.set_weights(fresh)?;
        let found = store.read(|weights| Decoder::new(&fixture.shape, &layout).logits(weights, &ids, ROWS))??;
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&found) == bits(&expected));
    }
    Ok(())
}

#[test]
fn prompts_read_together_through_adapters_have_the_logits_that_each_has_alone() -> Result<()> {
    for fixture in fixtures()? {
        let store = fixture.store(Quantization::None, 0.5)?;
        let mut decoder = Decoder::new(&fixture.shape, store.layout());
        let (ids, vocabulary, context) = (fixture.ids("inputs")?, decoder.vocab_size(), decoder.n_positions());
        let whole: Vec<u32> = ids.iter().copied().cycle().take(context).collect();
        let lengths = [3, 1, context, context / 2, 2, context - 1, 3];
        store.read(|weights| -> Result<()> {
            let mut read = |lengths: &[usize]| -> Result<Vec<f32>> {
                let mut cache = decoder.cache(lengths.len(), context);
                let prompt = |(sequence, &length): (usize, &usize)| Prompt { sequence, tokens: &whole[..length] };
                let prompts: Vec<Prompt> = lengths.iter().enumerate().map(prompt).collect();
                let mut logits = vec![0.0; lengths.len() * vocabulary];
                decoder.prefill(weights, &mut cache, &prompts, &mut logits)?;
                Ok(logits)
            };
            let together = read(&lengths)?;
            for (length, logits) in lengths.into_iter().zip(together.chunks_exact(vocabulary)) {
                assert!(read(&[length])? == logits, "{length} tokens of {:?}", fixture.shape.architecture());
            }
            Ok(())
        })??;
    }
    Ok(())
}

#[test]
fn merged_weights_give_the_logits_of_base_and_adapters() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for fixture in fixtures()? {
        let ids = fixture.ids("inputs")?;
        for (quantization, prefix) in [(Quantization::None, ""), (Quantization::Nf4, "nf4.")] {
            let store = fixture.store(quantization, 0.1)?;
            let layout = Arc::clone(store.layout());
            let path = folder.path().join(weights::SINGLE);
            store.read(|weights| {
                let frozen = weights.frozen.context("a frozen base")?;
                merge::write(&path, &fixture.shape, frozen, &layout, weights.exact, NamePrefix::None)
            })??;
            let own = Arc::new(Layout::new(fixture.shape.parameter_specs()));
            let mut merged = vec![0.0; own.len()];
            fixture.shape.load(&own, &[path], &mut merged)?;
            let logits = Decoder::new(&fixture.shape, &own).logits(&merged[..], &ids, ROWS)?;
            let what = format!("{prefix}merged {:?}", fixture.shape.architecture());
            near(&what, &logits, &fixture.numbers(&format!("{prefix}logits"))?, 1e-5);
        }
    }
    Ok(())
}

#[test]
fn the_same_draw_drops_the_same_and_recomputing_a_block_does_not_draw_again() -> Result<()> {
    for fixture in fixtures()? {
        let (inputs, targets) = (fixture.ids("inputs")?, fixture.ids("targets")?);
        let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
        let mut store = fixture.store(Quantization::Nf4, 0.3)?;
        let layout = Arc::clone(store.layout());
        let mut run = |recompute: Recompute, step: u64, micro_batch: u64| -> Result<(u64, Vec<u32>)> {
            let mut engine = fixture.engine(&layout, recompute);
            engine.draw(Draw { seed: 5, step, micro_batch });
            store.start_gradients();
            let loss = engine.gradients(&mut store, batch, Labels::Data)?;
            let gradients = slice(store.gradients(), |x| x.iter().map(|x| x.to_bits()).collect())?;
            // An evaluation drops nothing, before and after.
            near("evaluation", &[engine.loss(&store, batch)?.sum as f32], &fixture.numbers("nf4.loss")?, 1e-5);
            Ok((loss.sum.to_bits(), gradients))
        };
        let first = run(Recompute::None, 1, 0)?;
        assert!(first == run(Recompute::None, 1, 0)? && first == run(Recompute::Block, 1, 0)?);
        assert!(first.0 != run(Recompute::None, 2, 0)?.0 && first.0 != run(Recompute::None, 1, 1)?.0);
    }
    Ok(())
}

#[test]
fn gradients_under_dropout_are_the_slopes_of_the_loss_under_the_same_draw() -> Result<()> {
    for fixture in fixtures()? {
        let (inputs, targets) = (fixture.ids("inputs")?, fixture.ids("targets")?);
        let batch = Batch { inputs: &inputs, targets: &targets, rows: ROWS, documents: Documents::Whole };
        let mut store = fixture.store(Quantization::None, 0.4)?;
        let layout = Arc::clone(store.layout());
        let mut engine = fixture.engine(&layout, Recompute::None);
        engine.draw(Draw { seed: 1, step: 4, micro_batch: 2 });
        let mut loss_at = |numbers: &[f32]| -> Result<(f64, Vec<f32>)> {
            store.set_weights(numbers.to_vec())?;
            store.start_gradients();
            let loss = engine.gradients(&mut store, batch, Labels::Data)?;
            Ok((loss.sum, slice(store.gradients(), <[f32]>::to_vec)?))
        };
        let mut numbers = vec![0.0; layout.len()];
        peft::load(&fixture.folder.join(peft::WEIGHTS), &layout, &mut numbers)?;
        let (_, gradients) = loss_at(&numbers)?;
        for parameter in layout.parameters() {
            // Along the gradient of one parameter the slope is its norm.
            let own = &gradients[parameter.range()];
            let norm = own.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let step = 2e-3;
            let mut moved = |sign: f64| -> Result<f64> {
                let mut moved = numbers.clone();
                let pairs = moved[parameter.range()].iter_mut().zip(own);
                pairs.for_each(|(x, g)| *x += (sign * step * f64::from(*g) / norm) as f32);
                Ok(loss_at(&moved)?.0)
            };
            let slope = (moved(1.0)? - moved(-1.0)?) / (2.0 * step);
            assert!((slope - norm).abs() < 2e-2 * (norm + 0.1), "{}: slope {slope}, gradient {norm}", parameter.name);
        }
    }
    Ok(())
}

#[test]
fn what_is_written_in_pefts_format_is_read_again_as_it_was() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for fixture in fixtures()? {
        let layout = fixture.layout()?;
        let mut numbers = vec![0.0; layout.len()];
        peft::load(&fixture.folder.join(peft::WEIGHTS), &layout, &mut numbers)?;
        let config = peft::config(&fixture.shape, &fixture.settings, 0.1, "a/base");
        peft::write(folder.path(), &config, &layout, &numbers)?;
        assert_eq!(peft::read_config_file(&folder.path().join(peft::CONFIG))?, fixture.settings);
        let mut again = vec![0.0; layout.len()];
        peft::load(&folder.path().join(peft::WEIGHTS), &layout, &mut again)?;
        assert_eq!(again, numbers);
        let ours = std::fs::read(folder.path().join(peft::WEIGHTS))?;
        let theirs = std::fs::read(fixture.folder.join(peft::WEIGHTS))?;
        let names = |bytes: &[u8]| -> Result<Vec<String>> {
            let mut names: Vec<_> = SafeTensors::deserialize(bytes)?.names().into_iter().map(str::to_owned).collect();
            names.sort();
            Ok(names)
        };
        assert_eq!(names(&ours)?, names(&theirs)?);
    }
    Ok(())
}

#[test]
fn targets_are_last_words_of_paths_and_a_strange_one_is_named() -> Result<()> {
    let [gpt2, llama] = fixtures()?;
    let specs = |fixture: &Fixture, targets: &[&str]| {
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        let settings = AdapterSettings { rank: 2, alpha: 2.0, targets, scaling: Scaling::Rank };
        fixture.shape.adapter_specs(&settings).map(|specs| specs.len())
    };
    // Two layers, A and B each.
    assert_eq!(specs(&gpt2, &["c_proj"]), Ok(2 * 2 * 2), "of attention and of the MLP");
    assert_eq!(specs(&gpt2, &["attn.c_proj"]), Ok(2 * 2));
    assert_eq!(specs(&gpt2, &["all-linear"]), Ok(4 * 2 * 2));
    assert_eq!(specs(&llama, &["q_proj", "down_proj"]), Ok(2 * 2 * 2));
    assert_eq!(specs(&llama, &["all-linear"]), Ok(7 * 2 * 2));
    assert_eq!(specs(&llama, &["proj"]), Err("proj".into()), "a part of a word is none");
    assert_eq!(specs(&llama, &["lm_head"]), Err("lm_head".into()));
    assert_eq!(
        llama.shape.target_words(),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    );
    Ok(())
}

#[test]
fn a_base_from_scratch_is_the_initial_model_of_its_seed_and_takes_the_bytes_that_the_plan_says() -> Result<()> {
    for fixture in fixtures()? {
        let adaptation = Adaptation { scaling: 1.0, dropout: 0.0 };
        for quantization in [Quantization::None, Quantization::Nf4] {
            let frozen = load_base(&fixture.shape, BaseSource::Scratch { seed: 4 }, quantization, adaptation)?;
            assert_eq!(frozen.bytes(), crate::model::freeze_bytes(&fixture.shape, quantization, None));
            let layout = frozen.layout();
            let mut initial = vec![0.0; layout.len()];
            fixture.shape.initialize(layout, 4, &mut initial);
            for (index, parameter) in layout.parameters().iter().enumerate() {
                match frozen.tensor(index) {
                    FrozenTensor::F32(numbers) => assert_eq!(numbers[..], initial[parameter.range()]),
                    FrozenTensor::Nf4(_) => assert!(fixture.shape.is_block_matrix(parameter)),
                    FrozenTensor::Bf16(_) => assert!(
                        parameter.name.contains("embed")
                            || parameter.name == "wte.weight"
                            || parameter.name == weights::HEAD
                    ),
                    FrozenTensor::F16(_) => panic!("{} in f16", parameter.name),
                }
            }
        }
    }
    Ok(())
}
