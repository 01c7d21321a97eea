//! `vrtrain plan`: what a run would need, before any of it is allocated.

use super::adapted::{Adapted, Base};
use super::prepare::{Prepared, prepare};
use super::run_length::Counting;
use super::setup::Initial;
use super::{ConfigChoice, Ending, doctor, print_json, warn};
use crate::data::Basis;
use crate::model::Extent;
use crate::ops::product::Precision;
use crate::params::Layout;
use crate::train::{GIB, Peak, short};
use anyhow::{Result, bail};
use serde_json::json;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub config: ConfigChoice,
    pub tokens_per_s: Option<f64>,
    pub json: bool,
}

/// The part of the products' speed that a whole step reaches here, for a guess of the time.
const TYPICAL_UTILISATION: f64 = 0.8;

/// What a run may reach on this device, where its products have been measured.
pub fn typical_tokens_per_s(peak: &Peak) -> Option<f64> {
    peak.flops_per_s.map(|flops_per_s| TYPICAL_UTILISATION * flops_per_s / peak.flops_per_token)
}

/// Bytes by part.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// The frozen base of adapters.
    pub base: usize,
    /// What is trained.
    pub weights: usize,
    pub gradients: usize,
    pub optimizer: usize,
    pub activations: usize,
}

impl Memory {
    pub fn total(&self) -> usize {
        self.base + self.weights + self.gradients + self.optimizer + self.activations
    }
}

/// The memory of a run's tensors; the program itself and the data queue come to that (some 0.1 GiB).
pub fn memory(prepared: &Prepared, layout: &Layout) -> Result<Memory> {
    let train = &prepared.config.train;
    let extent = Extent { rows: train.micro_batch, time: train.sequence_length };
    let (mut base, mut adapters) = (0, 0);
    if let Some(adapted) = &prepared.adapted {
        base = adapted.base_bytes(&prepared.model)?;
        adapters = adapted.working_bytes(&prepared.model, extent.tokens())?;
    }
    Ok(Memory {
        base,
        weights: match prepared.precision {
            Precision::Bf16 if prepared.adapted.is_none() => 6 * layout.len(),
            Precision::Bf16 | Precision::F32 => 4 * layout.len(),
        },
        gradients: 4 * layout.len(),
        optimizer: prepared.optimizer.state_bytes_per_parameter() * layout.len(),
        activations: if prepared.device.is_cpu() {
            adapters + prepared.model.working_bytes(extent, train.recompute, prepared.precision)
        } else {
            prepared.model.working_bytes_on_card(extent, train.recompute)
        },
    })
}

/// Refuses what cannot fit: the system would end the process half way without a word of where the memory goes. What the
/// machine cannot tell of itself is not refused.
pub fn check_fits(bytes: usize) -> Result<()> {
    let in_gib = |bytes: usize| format!("{:.1} GiB", bytes as f64 / GIB);
    let Ok(mut system) = sysinfo::System::new() else { return Ok(()) };
    system.refresh_memory();
    let all = system.total_memory() + system.total_swap();
    if all > 0 && bytes as u64 > all {
        bail!(
            "this needs about {}, and the machine has {}: a smaller model, train.micro_batch or train.sequence_length, \
             train.recompute = \"block\", or adapters ([lora]) need less (`vrtrain plan` says what needs how much)",
            in_gib(bytes),
            in_gib(all as usize)
        );
    }
    Ok(())
}

/// Prints the plan.
pub fn run(options: &Options) -> Result<Ending> {
    let prepared = prepare(options.config.load()?, None, Counting::Estimated)?;
    warn(&prepared.warnings);
    let (layout, own) = (prepared.layout()?, Layout::new(prepared.model.parameter_specs()));
    let (train, memory) = (&prepared.config.train, memory(&prepared, &layout)?);
    let flops = prepared.flops_per_token(&layout);
    let tokens = prepared.steps as f64 * train.tokens_per_step as f64;
    let speed = options
        .tokens_per_s
        .unwrap_or_else(|| TYPICAL_UTILISATION * doctor::measured_flops_per_s(prepared.precision) / flops);
    let seconds = tokens / speed;
    let initial = match &prepared.adapted {
        Some(Adapted { base: Base::Stored { weights, .. }, .. }) => weights,
        _ => &prepared.initial,
    };
    let download = match initial {
        Initial::Hub(model) => model.weight_bytes(super::setup::LazyHub::default().get()?)?,
        _ => 0,
    };
    let estimated = prepared.pass.as_ref().is_some_and(|pass| pass.basis == Basis::Estimated);
    let read_bytes = prepared.data.read_bytes();
    let basis = if options.tokens_per_s.is_some() { "as given" } else { "guessed from this machine's products" };
    if options.json {
        print_json(&json!({
            "parameters": own.count(), "trainable": layout.count(),
            "memory_bytes": {
                "base": memory.base, "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
                "activations": memory.activations, "total": memory.total(),
            },
            "flops_per_token": flops, "steps": prepared.steps, "steps_estimated": estimated, "tokens": tokens,
            "download_bytes": { "weights": download, "data_per_epoch": read_bytes },
            "tokens_per_s": speed, "tokens_per_s_basis": basis, "seconds": seconds,
        }))?;
        return Ok(Ending::Done);
    }
    let gib = |bytes: usize| format!("{:.2} GiB", bytes as f64 / GIB);
    println!("parameters   {} ({})", own.count(), short(own.count() as f64));
    if let Some(adapted) = &prepared.adapted {
        println!("adapters     {}", adapted.describe(layout.count(), &prepared.model));
    }
    println!("memory       {} at most", gib(memory.total()));
    if prepared.adapted.is_some() {
        println!("  frozen base  {}", gib(memory.base));
    }
    println!("  weights      {}", gib(memory.weights));
    println!("  gradients    {}", gib(memory.gradients));
    println!("  optimizer    {}", gib(memory.optimizer));
    println!("  activations  {}", gib(memory.activations));
    let about = if estimated { " (estimated from a part of the data; a run counts them all first)" } else { "" };
    println!(
        "work         {} FLOPs a token, {} tokens in {} steps{about}",
        short(flops),
        short(tokens),
        prepared.steps
    );
    println!("download     weights {}B; data {}B an epoch", short(download as f64), short(read_bytes as f64));
    println!("time         {:.1} h at {} tok/s ({basis})", seconds / 3600.0, short(speed));
    Ok(Ending::Done)
}
