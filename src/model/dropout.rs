//! Where a model drops numbers while it trains: what the embeddings give, attention's probabilities, and what each half
//! of a block adds to the residual stream.

use crate::ops::dropout::{self, Draw, Mask};
use crate::ops::profile::{Part, timed};

/// A place of dropout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    Embedding,
    /// The probabilities of a layer's attention.
    Probabilities(usize),
    AfterAttention(usize),
    AfterMlp(usize),
}

impl Site {
    /// A number of its own. Adapters take those of the parameters that they stand beside, which are far below.
    fn place(self) -> u64 {
        let (kind, layer) = match self {
            Self::Embedding => (0, 0),
            Self::Probabilities(layer) => (1, layer),
            Self::AfterAttention(layer) => (2, layer),
            Self::AfterMlp(layer) => (3, layer),
        };
        1 << 40 | (layer as u64) << 8 | kind
    }

    /// The mask of this site in a pass that draws by `draw`; none in an evaluation, or where nothing is dropped.
    pub fn mask(self, draw: Option<Draw>, probability: f64) -> Option<Mask> {
        let draw = draw.filter(|_| probability > 0.0)?;
        Some(Mask::new(draw.key(self.place()), probability))
    }
}

/// The gradient of what was added to the stream: of `d_stream` [R, C] what the mask lets pass, in `room`, or all of it.
pub fn dropped<'a>(mask: Option<Mask>, d_stream: &'a [f32], width: usize, room: &'a mut [f32]) -> &'a [f32] {
    let Some(mask) = mask else { return d_stream };
    let room = &mut room[..d_stream.len()];
    timed(Part::Activation, || dropout::forward(mask, d_stream.into(), width, room));
    room
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recompute;
    use crate::model::{Batch, Documents, Engine, IGNORE, Labels, ModelShape};
    use crate::ops::product::Precision;
    use crate::params::{Layout, ParameterStore, slice, slice_mut};
    use crate::random::{Stream, below, fill_normal, generator};
    use anyhow::Result;
    use candle_core::Device;
    use serde_json::json;
    use std::sync::Arc;

    const ROWS: usize = 3;
    const TIME: usize = 13;
    const DRAW: Draw = Draw { seed: 5, step: 3, micro_batch: 1 };

    /// A small model of each architecture with its weights and a batch of tokens.
    fn cases() -> Result<Vec<(ModelShape, ParameterStore, Vec<u32>)>> {
        let gpt2 = json!({"n_embd": 24, "n_head": 3, "n_layer": 2, "n_inner": 20, "n_positions": 13, "vocab_size": 53});
        let llama = json!({
            "model_type": "llama", "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 2, "intermediate_size": 20, "vocab_size": 53, "max_position_embeddings": 13
        });
        let case = |config| {
            let shape = ModelShape::from_hugging_face(&config).map_err(anyhow::Error::msg)?;
            let layout = Arc::new(Layout::new(shape.parameter_specs()));
            let store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
            let mut random = generator(11, Stream::Init);
            slice_mut(store.weights(), |weights| {
                for parameter in layout.parameters() {
                    fill_normal(&mut random, 0.3, &mut weights[parameter.range()]);
                    if parameter.name.contains("ln_") || parameter.name.contains("norm") {
                        weights[parameter.range()].iter_mut().for_each(|weight| *weight += 1.0);
                    }
                }
            })?;
            let mut ids: Vec<u32> = (0..2 * ROWS * TIME).map(|_| below(&mut random, 53) as u32).collect();
            ids[ROWS * TIME..].iter_mut().step_by(7).for_each(|target| *target = IGNORE);
            Ok((shape, store, ids))
        };
        [gpt2, llama].into_iter().map(case).collect()
    }

    fn batch(ids: &[u32]) -> Batch<'_> {
        let (inputs, targets) = ids.split_at(ROWS * TIME);
        Batch { inputs, targets, rows: ROWS, documents: Documents::Whole }
    }

    fn engine(shape: &ModelShape, store: &ParameterStore, recompute: Recompute, probability: f64) -> Engine {
        let mut engine = Engine::new(shape, store.layout(), &Device::Cpu, recompute, Precision::F32);
        engine.set_dropout(probability);
        engine.draw(DRAW);
        engine
    }

    fn gradients(engine: &mut Engine, store: &mut ParameterStore, ids: &[u32]) -> Result<(f64, Vec<f32>)> {
        store.start_gradients();
        let loss = engine.gradients(store, batch(ids), Labels::Data)?;
        Ok((loss.sum, slice(store.gradients(), <[f32]>::to_vec)?))
    }

    #[test]
    fn with_dropout_every_gradient_is_that_of_finite_differences_under_the_same_masks() -> Result<()> {
        for (shape, mut store, ids) in cases()? {
            let mut engine = engine(&shape, &store, Recompute::None, 0.3);
            let (_, gradient) = gradients(&mut engine, &mut store, &ids)?;
            for parameter in store.layout().parameters().to_vec() {
                let gradient = &gradient[parameter.range()];
                let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
                // Along its own gradient the loss changes by its norm.
                let mut loss_at = |step: f64| -> Result<f64> {
                    let before = slice(store.weights(), <[f32]>::to_vec)?;
                    slice_mut(store.weights(), |weights| {
                        let pairs = weights[parameter.range()].iter_mut().zip(gradient);
                        pairs.for_each(|(weight, &g)| *weight += (step / norm * f64::from(g)) as f32);
                    })?;
                    let loss = gradients(&mut engine, &mut store, &ids)?.0;
                    store.set_weights(before)?;
                    Ok(loss)
                };
                let numeric = (loss_at(0.01)? - loss_at(-0.01)?) / 0.02;
                assert!((numeric - norm).abs() < 0.02 * norm, "{}: {numeric} {norm}", parameter.name);
            }
        }
        Ok(())
    }

    #[test]
    fn masks_are_those_of_the_draw_alone_and_an_evaluation_drops_nothing() -> Result<()> {
        for (shape, mut store, ids) in cases()? {
            let run =
                |store: &mut ParameterStore, threads: usize, recompute: Recompute, probability: f64, draw: Draw| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
                    pool.install(|| {
                        let mut engine = engine(&shape, store, recompute, probability);
                        engine.draw(draw);
                        gradients(&mut engine, store, &ids)
                    })
                };
            let first = run(&mut store, 1, Recompute::None, 0.2, DRAW)?;
            assert!(first == run(&mut store, 3, Recompute::Block, 0.2, DRAW)?);
            let next = Draw { micro_batch: 2, ..DRAW };
            assert!(first.0 != run(&mut store, 1, Recompute::None, 0.2, next)?.0);
            let none = run(&mut store, 1, Recompute::None, 0.0, DRAW)?;
            assert!(first.0 != none.0);
            assert_eq!(engine(&shape, &store, Recompute::None, 0.2).loss(&store, batch(&ids))?.sum, none.0);
        }
        Ok(())
    }
}
