//! Arguments of `vrtrain bench`.

use super::shared::{at_least_one, precision};
use crate::commands::{Ending, bench};
use crate::config::{Architecture, DeviceChoice, ModelConfig, Recompute};
use crate::ops::product::Precision;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Subcommand)]
pub(super) enum BenchCommand {
    /// Tokens per second of a training step on random tokens, and where its time goes (default: GPT-2 124M).
    #[command(
        after_help = "Examples:\n  vrtrain bench train --n-layer 6 --n-embd 384 --n-head 6 --json\n  vrtrain bench train --device cuda:0"
    )]
    Train(BenchTrainArgs),
    /// Tokens per second of reading prompts and of writing, on a model's real weights.
    #[command(after_help = "Example:\n  vrtrain bench generate runs/quickstart-1 --json")]
    Generate(BenchGenerateArgs),
    /// VRAdam's step beside AdamW's and beside the time that memory needs, on 124M parameters (5 GB).
    #[command(
        after_help = "Examples:\n  vrtrain bench optimizer --pairs 21 --json\n  vrtrain bench optimizer --device cuda:0"
    )]
    Optimizer {
        /// Alternated pairs of steps.
        #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
        pairs: u32,
        /// auto, cpu or cuda:N.
        #[arg(long, default_value = "auto")]
        device: DeviceChoice,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
pub(super) struct BenchTrainArgs {
    /// A model's folder or config.json, whose shape is taken.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["arch", "n_layer", "n_head", "n_embd", "n_kv_head", "n_inner", "vocab_size"])]
    init: Option<PathBuf>,
    /// gpt2 or llama.
    #[arg(long, default_value = "gpt2", value_parser = ["gpt2", "llama"])]
    arch: String,
    #[arg(long, default_value_t = 12, value_parser = at_least_one)]
    n_layer: usize,
    #[arg(long, default_value_t = 12, value_parser = at_least_one)]
    n_head: usize,
    #[arg(long, default_value_t = 768, value_parser = at_least_one)]
    n_embd: usize,
    /// Heads of keys and values [default: n-head; llama alone].
    #[arg(long, value_parser = at_least_one)]
    n_kv_head: Option<usize>,
    /// Width of the MLP [default: 4 n-embd; llama: 8/3 of it].
    #[arg(long, value_parser = at_least_one)]
    n_inner: Option<usize>,
    #[arg(long, default_value_t = 50257, value_parser = at_least_one)]
    vocab_size: usize,
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch: u32,
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    sequence_length: u32,
    /// Steps that are measured, after two that are not.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// none, or block: keep each block's input alone and compute the rest again.
    #[arg(long, default_value = "none", value_parser = ["none", "block"])]
    recompute: String,
    /// f32, bf16 (the operands of the products are rounded to bf16) or, on a card, tf32.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "tf32"])]
    dtype: String,
    /// cpu, auto, or cuda:N, where no part is timed alone.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct BenchGenerateArgs {
    /// A run folder, a checkpoint, a model folder, or a hub id.
    #[arg(value_name = "RUN|MODEL")]
    target: String,
    /// Texts at a time, at most 32.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    new_tokens: u32,
    /// Rounds that are measured, after one that is not.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// f32, or bf16: weights and operands of the products are rounded to bf16.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    dtype: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn bench(command: BenchCommand) -> anyhow::Result<Ending> {
    match command {
        BenchCommand::Train(args) => bench::train(&bench::TrainOptions {
            shape: match args.init {
                Some(path) => bench::TrainShape::Of(path),
                None => bench::TrainShape::Given(Box::new(ModelConfig {
                    arch: Some(if args.arch == "llama" { Architecture::Llama } else { Architecture::Gpt2 }),
                    n_layer: Some(args.n_layer),
                    n_head: Some(args.n_head),
                    n_embd: Some(args.n_embd),
                    n_kv_head: args.n_kv_head,
                    n_inner: args.n_inner,
                    vocab_size: Some(args.vocab_size),
                    ..ModelConfig::default()
                })),
            },
            micro_batch: args.micro_batch as usize,
            sequence_length: args.sequence_length as usize,
            steps: args.steps as usize,
            recompute: if args.recompute == "block" { Recompute::Block } else { Recompute::None },
            precision: if args.dtype == "bf16" { Precision::Bf16 } else { Precision::F32 },
            tf32: args.dtype == "tf32",
            device: args.device,
            json: args.json,
        }),
        BenchCommand::Generate(args) => bench::generate(&bench::GenerateOptions {
            target: args.target,
            batch: args.batch as usize,
            prompt_tokens: args.prompt_tokens as usize,
            new_tokens: args.new_tokens as usize,
            rounds: args.rounds as usize,
            precision: precision(&args.dtype),
            json: args.json,
        }),
        BenchCommand::Optimizer { pairs, device, json } => bench::optimizer(pairs as usize, device, json),
    }
}
