//! `vrtrain bench train`: tokens per second of a training step, and where its time goes.

use super::super::{Ending, device, doctor, print_json, setup, shape};
use crate::config::{ConfigError, DeviceChoice, ModelConfig, Recompute};
use crate::lab::statistics::median;
use crate::model::{Batch, Documents, Engine, Extent, Labels, ModelShape};
use crate::ops::product::Precision;
use crate::ops::profile::{self, Part};
use crate::optim::{NoSecondPass, Optimizer, OptimizerConfig, StepInput};
use crate::params::{Layout, ParameterStore};
use crate::random::{Stream, below, generator};
use crate::train::{GIB, peak_memory_bytes};
use anyhow::Result;
use candle_core::Device;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which model.
#[derive(Clone, Debug)]
pub enum Shape {
    /// That of a model's folder or config.json.
    Of(PathBuf),
    /// From the sizes on the command line.
    Given(Box<ModelConfig>),
}

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub shape: Shape,
    pub micro_batch: usize,
    pub sequence_length: usize,
    pub steps: usize,
    pub recompute: Recompute,
    pub precision: Precision,
    /// Whether a card's products may round what they read to TF32.
    pub tf32: bool,
    pub device: DeviceChoice,
    pub json: bool,
}

impl Options {
    fn extent(&self) -> Extent {
        Extent { rows: self.micro_batch, time: self.sequence_length }
    }
}

/// Steps that are not counted: they touch the buffers' pages for the first time.
const WARM_UP: usize = 2;

/// What was measured.
struct Measured {
    /// Of each step, ascending.
    seconds: Vec<f64>,
    /// Of all steps.
    parts: Vec<(Part, Duration)>,
    /// What the machine's products reach; not measured on a card.
    peak_flops_per_s: Option<f64>,
    /// Of the process; not known of a card.
    memory: Option<u64>,
}

impl Measured {
    fn median(&self) -> f64 {
        median(&self.seconds).unwrap_or(f64::NAN)
    }

    /// Milliseconds a step.
    fn ms(&self, part: Part) -> f64 {
        let time = self.parts.iter().find(|(other, _)| *other == part).map_or(Duration::ZERO, |(_, time)| *time);
        1e3 * time.as_secs_f64() / self.seconds.len() as f64
    }
}

/// Trains on random tokens and prints the medians.
pub fn run(options: &Options) -> Result<Ending> {
    let shape = model_shape(options)?;
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let (device, choice, _) = device::resolve(options.device).map_err(|why| ConfigError::flag("--device", why))?;
    if !device.is_cpu() && options.precision == Precision::Bf16 {
        return Err(ConfigError::flag("--device", "a card trains in f32 or tf32, not in bf16: see --dtype").into());
    }
    if options.tf32 {
        device::allow_tf32(&device).map_err(|why| ConfigError::flag("--dtype", format!("tf32: {why}")))?;
    }
    let options = &Options { device: choice, ..options.clone() };
    let measured = measure(options, &shape, &layout, &device).map_err(device::explain)?;
    if options.json {
        print_json(&as_json(options, &shape, &layout, &measured))?;
    } else {
        print(options, &shape, &layout, &measured);
    }
    Ok(Ending::Done)
}

fn model_shape(options: &Options) -> Result<ModelShape> {
    let time = options.sequence_length;
    let shape = match &options.shape {
        Shape::Of(path) => {
            let file = if path.is_dir() { path.join("config.json") } else { path.clone() };
            setup::read_model_config(&file).map_err(|why| ConfigError::flag("--init", format!("{why:#}")))?
        }
        Shape::Given(config) => {
            let (width, heads) = (config.n_embd.unwrap_or(0), config.n_head.unwrap_or(1));
            if !width.is_multiple_of(heads) {
                return Err(ConfigError::flag("--n-embd", "the width must be a multiple of --n-head").into());
            }
            if config.n_kv_head.is_some_and(|kv_heads| !heads.is_multiple_of(kv_heads)) {
                return Err(ConfigError::flag("--n-kv-head", "it must divide --n-head").into());
            }
            let shape = shape::from_scratch(config, None, time.max(1024))?;
            match &shape {
                ModelShape::Gpt2(_) if config.n_kv_head.is_some_and(|kv_heads| kv_heads != heads) => {
                    return Err(ConfigError::flag("--n-kv-head", "GPT-2 has as many as --n-head").into());
                }
                ModelShape::Llama(llama) if !llama.head_dim.is_multiple_of(2) => {
                    return Err(ConfigError::flag("--n-embd", "LLaMA's heads must have an even width").into());
                }
                _ => shape,
            }
        }
    };
    if time > shape.n_positions() {
        let message = format!("the model's context holds {} positions", shape.n_positions());
        return Err(ConfigError::flag("--sequence-length", message).into());
    }
    Ok(shape)
}

fn measure(options: &Options, shape: &ModelShape, layout: &Arc<Layout>, device: &Device) -> Result<Measured> {
    let Extent { rows, time } = options.extent();
    const MOST_TOKENS: usize = 1 << 30;
    if rows.saturating_mul(time) > MOST_TOKENS {
        let message = format!("{rows} x {time} tokens a step are too many: at most {MOST_TOKENS}");
        return Err(ConfigError::flag("--micro-batch", message).into());
    }
    // Weights, gradients and VRAdam's two moments; the copy in bf16.
    let of_a_parameter = if options.precision == Precision::Bf16 { 18 } else { 16 };
    let working = shape.working_bytes(options.extent(), options.recompute, options.precision);
    if device.is_cpu() {
        super::super::plan::check_fits(of_a_parameter * layout.len() + working)?;
    }
    let mut store = ParameterStore::new(Arc::clone(layout), device)?;
    let mut weights = vec![0.0; layout.len()];
    shape.initialize(layout, 1, &mut weights);
    store.set_weights(weights)?;
    if options.precision == Precision::Bf16 {
        store.keep_rounded()?;
    }
    let mut engine = Engine::new(shape, layout, device, options.recompute, options.precision);
    let mut optimizer = OptimizerConfig::from_keys("vradam", &[])?.build(layout, device)?;
    let (mut random, vocabulary) = (generator(1, Stream::Init), shape.vocab_size() as u64);
    let ids: Vec<u32> = (0..2 * rows * time).map(|_| below(&mut random, vocabulary) as u32).collect();
    let (inputs, targets) = ids.split_at(rows * time);
    let batch = Batch { inputs, targets, rows, documents: Documents::Whole };
    for _ in 0..WARM_UP {
        step(&mut engine, &mut store, &mut *optimizer, batch)?;
    }
    let mut seconds = Vec::with_capacity(options.steps);
    profile::start();
    for _ in 0..options.steps {
        seconds.push(step(&mut engine, &mut store, &mut *optimizer, batch)?);
    }
    let parts = profile::stop();
    seconds.sort_by(f64::total_cmp);
    // Before the peak's own product asks for memory.
    let host = device.is_cpu().then(|| (peak_memory_bytes(), doctor::measured_flops_per_s(options.precision)));
    let (memory, peak_flops_per_s) = host.map_or((None, None), |(memory, peak)| (memory, Some(peak)));
    Ok(Measured { seconds, parts, peak_flops_per_s, memory })
}

fn step(engine: &mut Engine, store: &mut ParameterStore, optimizer: &mut dyn Optimizer, batch: Batch) -> Result<f64> {
    let started = Instant::now();
    store.start_gradients();
    let loss = engine.gradients(store, batch, Labels::Data)?;
    let input = StepInput { scheduled_lr: 1e-4, gradient_scale: 1.0 / loss.count as f64, grad_clip: Some(1.0) };
    profile::timed(Part::Optimizer, || optimizer.step(store, &input, &mut NoSecondPass))?;
    Ok(started.elapsed().as_secs_f64())
}

/// What a part's products reach, next to [`Measured::peak_flops_per_s`].
fn share_of_peak(options: &Options, shape: &ModelShape, measured: &Measured, part: Part) -> Option<f64> {
    let flops = part_flops(shape, options.extent(), options.recompute, part)?;
    Some(flops / (measured.ms(part) / 1e3) / measured.peak_flops_per_s?)
}

fn as_json(options: &Options, shape: &ModelShape, layout: &Layout, measured: &Measured) -> serde_json::Value {
    let (extent, median) = (options.extent(), measured.median());
    let part = |part: Part| {
        let share = share_of_peak(options, shape, measured, part);
        (part.name().to_owned(), json!({ "ms": measured.ms(part), "share_of_peak": share }))
    };
    json!({
        "model": shape.describe(), "parameters": layout.count(), "rows": extent.rows,
        "sequence_length": extent.time, "steps": measured.seconds.len(), "threads": rayon::current_num_threads(),
        "device": options.device.to_string(), "dtype": dtype(options),
        "recompute": options.recompute == Recompute::Block,
        "step_ms": median * 1e3, "step_ms_min": measured.seconds[0] * 1e3,
        "tokens_per_s": extent.tokens() as f64 / median,
        "flops_per_s": flops(shape, extent) / median, "peak_flops_per_s": measured.peak_flops_per_s,
        "peak_memory_bytes": measured.memory,
        "working_bytes": shape.working_bytes(extent, options.recompute, options.precision),
        // On a card the parts of a step run together: no part has a time of its own.
        "parts": measured.peak_flops_per_s.map(|_| Part::ALL.into_iter().map(part).collect::<serde_json::Map<_, _>>()),
    })
}

fn dtype(options: &Options) -> &'static str {
    match options.precision {
        Precision::F32 if options.tf32 => "tf32",
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}

/// FLOPs of a step.
fn flops(shape: &ModelShape, extent: Extent) -> f64 {
    shape.flops_per_token(extent.time) * extent.tokens() as f64
}

fn print(options: &Options, shape: &ModelShape, layout: &Layout, measured: &Measured) {
    let (extent, median) = (options.extent(), measured.median());
    let flops_per_s = flops(shape, extent) / median;
    println!("{}: {} parameters", shape.describe(), layout.count());
    println!(
        "{} x {} tokens, {}, {}{}",
        extent.rows,
        extent.time,
        if measured.peak_flops_per_s.is_none() {
            options.device.to_string()
        } else {
            format!("{} threads", rayon::current_num_threads())
        },
        dtype(options),
        if options.recompute == Recompute::Block { ", blocks computed again" } else { "" }
    );
    println!(
        "step     {:8.1} ms median, {:.1} ms best of {}",
        median * 1e3,
        measured.seconds[0] * 1e3,
        measured.seconds.len()
    );
    let share = measured
        .peak_flops_per_s
        .map_or(String::new(), |peak| format!(" ({:.0}% of the measured products)", 100.0 * flops_per_s / peak));
    let speed = extent.tokens() as f64 / median;
    println!("speed    {speed:8.0} tok/s, {:.0} GFLOP/s{share}", flops_per_s / 1e9);
    if measured.peak_flops_per_s.is_none() {
        return;
    }
    if let Some(bytes) = measured.memory {
        let working = shape.working_bytes(extent, options.recompute, options.precision);
        println!(
            "memory   {:8.2} GiB at the peak, {:.2} of it activations and their gradients",
            bytes as f64 / GIB,
            working as f64 / GIB
        );
    }
    let mut rest = 1e3 * measured.seconds.iter().sum::<f64>() / measured.seconds.len() as f64;
    for part in Part::ALL {
        rest -= measured.ms(part);
        let share = share_of_peak(options, shape, measured, part);
        let share = share.map_or(String::new(), |share| format!("  {:.0}% of the measured products", 100.0 * share));
        println!("  {:<26} {:8.2} ms{share}", part.name(), measured.ms(part));
    }
    println!("  {:<26} {rest:8.2} ms", "the rest");
}

/// FLOPs of a part's products; `None` where products are not what it does.
fn part_flops(shape: &ModelShape, extent: Extent, recompute: Recompute, part: Part) -> Option<f64> {
    let tokens = extent.tokens() as f64;
    // Numbers of one layer's matrices, and the width of its queries.
    let (layers, matrices, query) = match shape {
        ModelShape::Gpt2(c) => (c.n_layer, c.n_embd * (4 * c.n_embd + 2 * c.n_inner), c.n_embd),
        ModelShape::Llama(c) => {
            let attention = 2 * c.n_embd * (c.query_width() + c.kv_width());
            (c.n_layer, attention + 3 * c.n_embd * c.n_inner, c.query_width())
        }
    };
    let linear = 2.0 * tokens * (layers * matrices) as f64;
    // Half of the time x time matrix lies above the diagonal and is not needed.
    let attention = 2.0 * tokens * (extent.time * layers * query) as f64;
    // Every block but the last runs forward twice.
    let forward = if recompute == Recompute::Block { (2 * layers - 1) as f64 / layers as f64 } else { 1.0 };
    let width = match shape {
        ModelShape::Gpt2(c) => c.n_embd,
        ModelShape::Llama(c) => c.n_embd,
    };
    match part {
        Part::LinearForward => Some(forward * linear),
        Part::LinearInputGradient | Part::LinearWeightGradient => Some(linear),
        Part::AttentionForward => Some(forward * attention),
        Part::AttentionBackward => Some(2.5 * attention),
        Part::Head => Some(6.0 * tokens * (width * shape.vocab_size()) as f64),
        Part::Embedding | Part::Norm | Part::Activation | Part::Adapters | Part::Optimizer => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_parts_products_add_up_to_the_work_of_a_step() {
        let gpt2 = json!({"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257});
        let llama = json!({
            "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
            "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": true
        });
        for config in [gpt2, llama] {
            let shape = ModelShape::from_hugging_face(&config).expect("a model's config");
            let extent = Extent { rows: 2, time: 512 };
            let parts = Part::ALL.into_iter().filter_map(|part| part_flops(&shape, extent, Recompute::None, part));
            // The convention 6N + 12 L H Q T counts the whole square of the attention and norms and biases as matrices.
            let ratio = parts.sum::<f64>() / flops(&shape, extent);
            assert!((0.9..1.0).contains(&ratio), "{ratio}");
        }
    }
}
