//! `vrtrain bench train`: tokens per second of a training step, and where its time goes.

use super::super::{Ending, doctor, print_json};
use crate::config::{ConfigError, Recompute};
use crate::model::gpt2::Gpt2Config;
use crate::model::{Batch, Documents, Engine, Head, Labels, ModelShape};
use crate::ops::product::Precision;
use crate::ops::profile::{self, Part};
use crate::optim::{NoSecondPass, OptimizerConfig, StepInput};
use crate::params::{Layout, ParameterStore};
use crate::random::{Stream, below, generator};
use crate::train::{GIB, peak_memory_bytes};
use anyhow::Result;
use candle_core::Device;
use serde_json::json;
use std::sync::Arc;
use std::time::Instant;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub n_layer: usize,
    pub n_head: usize,
    pub n_embd: usize,
    pub micro_batch: usize,
    pub sequence_length: usize,
    pub steps: usize,
    pub recompute: Recompute,
    pub precision: Precision,
    pub json: bool,
}

/// GPT-2's vocabulary.
const VOCABULARY: usize = 50257;

/// Steps that are not counted: they touch the buffers' pages for the first time.
const WARM_UP: usize = 2;

/// Trains on random tokens and prints the medians.
pub fn run(options: &Options) -> Result<Ending> {
    if options.n_head == 0 || !options.n_embd.is_multiple_of(options.n_head) {
        return Err(ConfigError::flag("--n-embd", "the width must be a multiple of --n-head").into());
    }
    let (rows, time) = (options.micro_batch, options.sequence_length);
    let config = Gpt2Config {
        n_layer: options.n_layer,
        n_head: options.n_head,
        n_embd: options.n_embd,
        n_inner: 4 * options.n_embd,
        n_positions: time.max(1024),
        vocab_size: VOCABULARY,
        layer_norm_epsilon: 1e-5,
        head: Head::Tied,
    };
    let shape = ModelShape::Gpt2(config.clone());
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let mut store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
    let mut weights = vec![0.0; layout.len()];
    shape.initialize(&layout, 1, &mut weights);
    store.set_weights(weights)?;
    if options.precision == Precision::Bf16 {
        store.keep_rounded()?;
    }
    let mut engine = Engine::new(&shape, &layout, &Device::Cpu, options.recompute, options.precision);
    let mut optimizer = OptimizerConfig::from_keys("vradam", &[])?.build(&layout, &Device::Cpu)?;
    let mut random = generator(1, Stream::Init);
    let ids: Vec<u32> = (0..2 * rows * time).map(|_| below(&mut random, VOCABULARY as u64) as u32).collect();
    let (inputs, targets) = ids.split_at(rows * time);
    let batch = Batch { inputs, targets, rows, documents: Documents::Whole };

    let mut seconds = Vec::new();
    let mut step = |engine: &mut Engine| -> Result<f64> {
        let started = Instant::now();
        store.start_gradients();
        let loss = engine.gradients(&mut store, batch, Labels::Data)?;
        let input = StepInput { scheduled_lr: 1e-4, gradient_scale: 1.0 / loss.count as f64, grad_clip: Some(1.0) };
        profile::timed(Part::Optimizer, || optimizer.step(&mut store, &input, &mut NoSecondPass))?;
        Ok(started.elapsed().as_secs_f64())
    };
    for _ in 0..WARM_UP {
        step(&mut engine)?;
    }
    profile::start();
    for _ in 0..options.steps {
        seconds.push(step(&mut engine)?);
    }
    let parts = profile::stop();
    let total: f64 = seconds.iter().sum();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let peak = doctor::measured_flops_per_s(options.precision);
    let flops = shape.flops_per_token(time) * (rows * time) as f64;
    let memory = peak_memory_bytes();
    let ms = |part: Part| {
        parts.iter().find(|(p, _)| *p == part).map_or(0.0, |(_, time)| 1e3 * time.as_secs_f64() / options.steps as f64)
    };
    let rate = |part: Part| part_flops(&config, rows, time, part).map(|flops| flops / (ms(part) / 1e3) / peak);
    if options.json {
        let parts: serde_json::Map<_, _> = Part::ALL
            .into_iter()
            .map(|part| (part.name().to_owned(), json!({ "ms": ms(part), "share_of_peak": rate(part) })))
            .collect();
        print_json(&json!({
            "parameters": layout.count(), "rows": rows, "sequence_length": time, "steps": options.steps,
            "threads": rayon::current_num_threads(), "step_ms": median * 1e3, "step_ms_min": seconds[0] * 1e3,
            "tokens_per_s": (rows * time) as f64 / median, "flops_per_s": flops / median,
            "peak_flops_per_s": peak, "peak_memory_bytes": memory, "parts": parts,
        }))?;
        return Ok(Ending::Done);
    }
    println!(
        "{} parameters, {rows} x {time} tokens, {} threads, {:?}",
        layout.count(),
        rayon::current_num_threads(),
        options.precision
    );
    println!("step     {:8.1} ms median, {:.1} ms best of {}", median * 1e3, seconds[0] * 1e3, options.steps);
    println!(
        "speed    {:8.0} tok/s, {:.0} GFLOP/s ({:.0}% of the measured products)",
        (rows * time) as f64 / median,
        flops / median / 1e9,
        100.0 * flops / median / peak
    );
    if let Some(bytes) = memory {
        println!("memory   {:8.2} GiB at the peak", bytes as f64 / GIB);
    }
    let mut rest = 1e3 * total / options.steps as f64;
    for part in Part::ALL {
        rest -= ms(part);
        let rate = rate(part).map_or(String::new(), |rate| format!("  {:.0}% of the measured products", 100.0 * rate));
        println!("  {:<26} {:8.2} ms{rate}", part.name(), ms(part));
    }
    println!("  {:<26} {rest:8.2} ms", "the rest");
    Ok(Ending::Done)
}

/// FLOPs of a part's products; `None` where products are not what it does.
fn part_flops(config: &Gpt2Config, rows: usize, time: usize, part: Part) -> Option<f64> {
    let (tokens, width) = ((rows * time) as f64, config.n_embd as f64);
    let weights = config.n_layer as f64 * width * (4.0 * width + 2.0 * config.n_inner as f64);
    // Half of the time x time matrix lies above the diagonal and is not needed.
    let attention = config.n_layer as f64 * 2.0 * tokens * time as f64 * width;
    match part {
        Part::LinearForward | Part::LinearInputGradient | Part::LinearWeightGradient => Some(2.0 * tokens * weights),
        Part::AttentionForward => Some(attention),
        Part::AttentionBackward => Some(2.5 * attention),
        Part::Head => Some(6.0 * tokens * width * config.vocab_size as f64),
        Part::Embedding | Part::Norm | Part::Activation | Part::Optimizer => None,
    }
}
