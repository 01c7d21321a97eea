//! `vrtrain bench optimizer`: the step on GPT-2 124M's number of parameters, beside the time that memory needs for it.
//!
//! VRAdam and AdamW, both with the clip, take turns on the same gradients with the memory itself; medians over the rounds
//! are printed, with the time for the same bytes. On the CPU those are 8 a parameter (gradient, velocity) at the read
//! bandwidth and 28 (reads of gradient, velocity, second moment, weight; writes of the last three) at the bandwidth of a
//! stream of that very shape; on a card all 36 at the bandwidth of a copy within its memory, which nothing is known to
//! exceed.

use super::super::{Ending, device, print_json};
use crate::config::{ConfigError, DeviceChoice};
use crate::lab::statistics::median;
use crate::optim::{CardCopy, NoSecondPass, Optimizer, OptimizerConfig, StepInput};
use crate::params::{Layout, ParameterSpec, ParameterStore};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// GPT-2 124M: parameters that decay and parameters that do not.
const DECAYED: usize = 124_318_464;
const PLAIN: usize = 121_344;
const CHUNK: usize = 1 << 16;
/// Bytes a parameter that VRAdam's two passes move, and of them what the reduction alone reads.
const BYTES: f64 = 36.0;
const REDUCTION_BYTES: f64 = 8.0;

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Reads both buffers once.
fn read(a: &[f32], b: &[f32]) {
    let sum = |(a, b): (&[f32], &[f32])| {
        let mut lanes = [0.0f32; 64];
        for (a, b) in a.as_chunks::<64>().0.iter().zip(b.as_chunks::<64>().0) {
            for lane in 0..64 {
                lanes[lane] += a[lane] + b[lane];
            }
        }
        lanes.iter().sum::<f32>()
    };
    black_box(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).map(sum).sum::<f32>());
}

/// Reads four streams and writes three of them with next to no arithmetic.
fn stream(gradient: &[f32], a: &mut [f32], b: &mut [f32], c: &mut [f32]) {
    let chunks = gradient.par_chunks(CHUNK).zip(a.par_chunks_mut(CHUNK));
    chunks.zip(b.par_chunks_mut(CHUNK)).zip(c.par_chunks_mut(CHUNK)).for_each(|(((gradient, a), b), c)| {
        for (((gradient, a), b), c) in gradient.iter().zip(a).zip(b).zip(c) {
            *a += gradient;
            *b += gradient;
            *c += gradient;
        }
    });
}

/// Buffers on which the memory's own speed is measured, between the steps: it moves by itself on a shared machine.
enum Memory {
    Cpu([Vec<f32>; 4]),
    Card(CardCopy),
}

impl Memory {
    fn new(count: usize, device: &Device) -> anyhow::Result<Self> {
        if device.is_cpu() {
            return Ok(Self::Cpu(std::array::from_fn(|_| vec![0.5f32; count])));
        }
        Ok(Self::Card(CardCopy::new(count, device)?))
    }

    /// What is measured: a name, and the bytes a parameter that it moves.
    fn measured(&self) -> &'static [(&'static str, f64)] {
        match self {
            Self::Cpu(_) => &[("read", REDUCTION_BYTES), ("update-stream", BYTES - REDUCTION_BYTES)],
            // What is read, and what is written.
            Self::Card(_) => &[("copy", 8.0)],
        }
    }

    /// Seconds of each once.
    fn seconds(&mut self) -> anyhow::Result<Vec<f64>> {
        match self {
            Self::Cpu([gradient, a, b, c]) => {
                Ok(vec![seconds(|| read(gradient, a)), seconds(|| stream(gradient, a, b, c))])
            }
            Self::Card(copy) => {
                const COPIES: usize = 10;
                let start = Instant::now();
                copy.run(COPIES)?;
                Ok(vec![start.elapsed().as_secs_f64() / COPIES as f64])
            }
        }
    }

    /// Seconds that VRAdam's bytes need at what [`Self::seconds`] took.
    fn floor(&self, seconds: &[f64]) -> f64 {
        let bytes: f64 = self.measured().iter().map(|(_, bytes)| bytes).sum();
        seconds.iter().sum::<f64>() * BYTES / bytes
    }
}

/// Seconds of one round: VRAdam's step, AdamW's, and what [`Memory::seconds`] measures.
struct Round {
    gated: f64,
    plain: f64,
    moved: Vec<f64>,
}

/// Measures and prints; `pairs` alternated pairs of steps.
pub fn run(pairs: usize, choice: DeviceChoice, json: bool) -> anyhow::Result<Ending> {
    let (device, ..) = device::resolve(choice).map_err(|why| ConfigError::flag("--device", why))?;
    let spec = |name: &str, len, decays| ParameterSpec { name: name.into(), shape: vec![len], decays };
    let layout = Arc::new(Layout::new(vec![spec("decayed", DECAYED, true), spec("plain", PLAIN, false)]));
    let mut store = ParameterStore::new(layout.clone(), &device)?;
    let number = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 - 32_768.0) * 1e-7;
    let numbers: Vec<f32> = (0..layout.len()).into_par_iter().map(number).collect();
    store.gradients().slice_set(&Tensor::from_slice(&numbers, numbers.len(), &device)?, 0, 0)?;
    store.set_weights(numbers)?;

    let mut memory = Memory::new(layout.len(), &device)?;
    let build = |name: &str| anyhow::Ok(OptimizerConfig::from_keys(name, &[])?.build(&layout, &device)?);
    let (mut vradam, mut adamw) = (build("vradam")?, build("adamw")?);
    let input = StepInput { scheduled_lr: 1e-4, gradient_scale: 1.0, grad_clip: Some(1.0) };
    // A step ends with what it decided in the host's hands, so the clock needs no further waiting on a card.
    let mut time = |optimizer: &mut Box<dyn Optimizer>| {
        let start = Instant::now();
        optimizer.step(&mut store, &input, &mut NoSecondPass)?;
        anyhow::Ok(start.elapsed().as_secs_f64())
    };
    let mut rounds: Vec<Round> = vec![];
    for round in 0..pairs + 1 {
        let gated = time(&mut vradam)?;
        let plain = time(&mut adamw)?;
        let moved = memory.seconds()?;
        // The first round touches the moments' pages for the first time, or loads the kernels.
        if round > 0 {
            rounds.push(Round { gated, plain, moved });
        }
    }
    let of =
        |number: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(number).collect::<Vec<f64>>()).unwrap_or(f64::NAN);
    let (gated_s, plain_s, ratio) = (of(&|r| r.gated), of(&|r| r.plain), of(&|r| r.gated / r.plain));
    let (floor_s, over_floor) = (of(&|r| memory.floor(&r.moved)), of(&|r| r.gated / memory.floor(&r.moved)));
    let reached = BYTES * layout.len() as f64 / gated_s / 1e9;
    let bandwidth = |(k, (name, bytes)): (usize, &(&'static str, f64))| {
        (*name, bytes * layout.len() as f64 / of(&|r| r.moved[k]) / 1e9)
    };
    let bandwidths: Vec<(&str, f64)> = memory.measured().iter().enumerate().map(bandwidth).collect();
    let threads = rayon::current_num_threads();
    if json {
        let mut object = serde_json::json!({
            "parameters": layout.count(), "threads": threads, "pairs": pairs,
            "device": if device.is_cpu() { "cpu" } else { "cuda" },
            "vradam_ms": gated_s * 1e3, "adamw_ms": plain_s * 1e3, "memory_floor_ms": floor_s * 1e3,
            "vradam_over_adamw": ratio, "vradam_over_memory_floor": over_floor, "vradam_gb_per_s": reached,
        });
        for (name, bandwidth) in &bandwidths {
            object[format!("{}_gb_per_s", name.replace('-', "_"))] = serde_json::json!(bandwidth);
        }
        print_json(&object)?;
        return Ok(Ending::Done);
    }
    let place = if device.is_cpu() { format!("{threads} threads") } else { "a CUDA device".into() };
    println!("{} parameters, {place}, medians of {pairs} alternated rounds", layout.count());
    for (name, bandwidth) in &bandwidths {
        println!("{:<25} {bandwidth:7.1} GB/s", format!("{name} bandwidth"));
    }
    println!("VRAdam, clip and gate     {:7.2} ms (36 bytes a parameter: {reached:.1} GB/s)", gated_s * 1e3);
    println!("AdamW, clip               {:7.2} ms (32 bytes a parameter)", plain_s * 1e3);
    println!("VRAdam / AdamW            {ratio:7.3} (bytes: 1.125)");
    println!("VRAdam / memory           {over_floor:7.3} of {:.2} ms for the same bytes", floor_s * 1e3);
    Ok(Ending::Done)
}
