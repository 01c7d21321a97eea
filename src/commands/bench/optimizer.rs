//! `vrtrain bench optimizer`: the step on GPT-2 124M's number of parameters, beside the time that memory needs for it.
//!
//! VRAdam and AdamW, both with the clip, take turns on the same gradients; medians of the pairs are printed, with the
//! time for the same bytes: 8 a parameter (gradient, velocity) at the read bandwidth, 28 (reads of gradient, velocity,
//! second moment, weight; writes of the last three) at the bandwidth of a stream of that very shape.

use super::super::{Ending, print_json};
use crate::optim::{NoSecondPass, Optimizer, OptimizerConfig, StepInput};
use crate::params::{Layout, ParameterSpec, ParameterStore, slice_mut};
use candle_core::Device;
use rayon::prelude::*;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// GPT-2 124M: parameters that decay and parameters that do not.
const DECAYED: usize = 124_318_464;
const PLAIN: usize = 121_344;
const CHUNK: usize = 1 << 16;

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

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

/// Measures and prints; `pairs` alternated pairs of steps.
pub fn run(pairs: usize, json: bool) -> anyhow::Result<Ending> {
    let spec = |name: &str, len, decays| ParameterSpec { name: name.into(), shape: vec![len], decays };
    let layout = Arc::new(Layout::new(vec![spec("decayed", DECAYED, true), spec("plain", PLAIN, false)]));
    let mut store = ParameterStore::new(layout.clone(), &Device::Cpu)?;
    let fill =
        |(i, x): (usize, &mut f32)| *x = ((i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 - 32_768.0) * 1e-7;
    slice_mut(store.gradients(), |numbers| numbers.par_iter_mut().enumerate().for_each(fill))?;
    slice_mut(store.weights(), |numbers| numbers.par_iter_mut().enumerate().for_each(fill))?;

    let count = layout.len() as f64;
    let mut buffers: [Vec<f32>; 4] = std::array::from_fn(|_| vec![0.5f32; layout.len()]);
    let mut reads = vec![];
    let mut streams = vec![];
    let [gradient, a, b, c] = &mut buffers;
    for _ in 0..5 {
        reads.push(seconds(|| read(gradient, a)));
        streams.push(seconds(|| stream(gradient, a, b, c)));
    }
    drop(buffers);
    let (read_s, stream_s) = (median(reads), median(streams));
    let build = |name: &str| anyhow::Ok(OptimizerConfig::from_keys(name, &[])?.build(&layout, &Device::Cpu)?);
    let (mut vradam, mut adamw) = (build("vradam")?, build("adamw")?);
    let input = StepInput { scheduled_lr: 1e-4, gradient_scale: 1.0, grad_clip: Some(1.0) };
    let mut time = |optimizer: &mut Box<dyn Optimizer>| {
        let start = Instant::now();
        optimizer.step(&mut store, &input, &mut NoSecondPass)?;
        anyhow::Ok(start.elapsed().as_secs_f64())
    };
    let (mut gated, mut plain) = (vec![], vec![]);
    for pair in 0..pairs + 1 {
        let (first, second) = (time(&mut vradam)?, time(&mut adamw)?);
        // The first pair touches the moments' pages for the first time.
        if pair > 0 {
            gated.push(first);
            plain.push(second);
        }
    }
    let ratios = gated.iter().zip(&plain).map(|(gated, plain)| gated / plain).collect();
    let (gated_s, plain_s, ratio) = (median(gated), median(plain), median(ratios));
    let floor = read_s + stream_s;
    let (read, stream) = (8.0 * count / read_s / 1e9, 28.0 * count / stream_s / 1e9);
    if json {
        print_json(&serde_json::json!({
            "parameters": layout.count(), "threads": rayon::current_num_threads(), "pairs": pairs,
            "read_gb_per_s": read, "update_stream_gb_per_s": stream,
            "vradam_ms": gated_s * 1e3, "adamw_ms": plain_s * 1e3, "memory_floor_ms": floor * 1e3,
            "vradam_over_adamw": ratio, "vradam_over_memory_floor": gated_s / floor,
        }))?;
        return Ok(Ending::Done);
    }
    println!(
        "{} parameters, {} threads, medians of {pairs} alternated pairs",
        layout.count(),
        rayon::current_num_threads()
    );
    println!("read bandwidth            {read:7.1} GB/s");
    println!("update-stream bandwidth   {stream:7.1} GB/s");
    println!("VRAdam, clip and gate     {:7.1} ms (36 bytes a parameter)", gated_s * 1e3);
    println!("AdamW, clip               {:7.1} ms (32 bytes a parameter)", plain_s * 1e3);
    println!("VRAdam / AdamW            {ratio:7.3} (bytes: 1.125)");
    println!("VRAdam / memory           {:7.3} of {:.1} ms for the same bytes", gated_s / floor, floor * 1e3);
    Ok(Ending::Done)
}
