//! The command line: arguments, dispatch, the error chain, exit codes. clap is known here alone.

use crate::commands::{self, Ending, bench, doctor, eval, export, generate, lab, plan, pretrain};
use crate::config::{Architecture, ConfigError, ModelConfig, Recompute};
use crate::ops::product::Precision;
use crate::train::StepLines;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Pre-train small GPTs from a terminal, with VRAdam.
///
/// Data goes to stdout, logs and progress to stderr. Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 interrupted
/// and saved.
#[derive(Parser)]
#[command(name = "vrtrain", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pre-train a model; without --config the embedded quickstart, which needs no network and no files.
    #[command(after_help = "Examples:\n  \
        vrtrain pretrain\n  \
        vrtrain pretrain --config configs/gpt2-124m.toml --set optimizer.beta3=20 --run-dir runs/a\n  \
        vrtrain pretrain --run-dir runs/a --resume")]
    Pretrain(PretrainArgs),
    /// Write text with a run or a model.
    #[command(after_help = "Examples:\n  \
        vrtrain generate runs/quickstart-1 --prompt 'Question: Tom has 3 apples'\n  \
        vrtrain generate openai-community/gpt2 --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95\n  \
        vrtrain generate runs/sort-1 --prompt-ids 0,2,1 --json")]
    Generate(GenerateArgs),
    /// Write a folder that transformers' from_pretrained loads.
    #[command(after_help = "Example:\n  vrtrain export runs/a --out my-model")]
    Export(ExportArgs),
    /// Measure a run or a model on a task.
    #[command(after_help = "Example:\n  vrtrain eval runs/a --task perplexity --data wiki.test.txt --json")]
    Eval(EvalArgs),
    /// Check this machine: device, instruction sets, memory, cache, hub, tokenizer.
    #[command(after_help = "Example:\n  vrtrain doctor --json")]
    Doctor(DoctorArgs),
    /// Say what a run would need (parameters, memory, FLOPs, download, time) before any allocation.
    #[command(after_help = "Example:\n  vrtrain plan --config configs/gpt2-124m.toml")]
    Plan(PlanArgs),
    /// Measure this machine: a training step, or the optimizer alone.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// The laboratory's studies.
    #[command(subcommand)]
    Lab(LabCommand),
}

#[derive(Subcommand)]
enum LabCommand {
    /// Where momentum with a velocity gate is stable, bounded, or cycles: on a quadratic and on Rosenbrock's function.
    #[command(after_help = "Example:\n  vrtrain lab stability --out stability")]
    Stability(StabilityArgs),
}

#[derive(Args)]
struct StabilityArgs {
    #[arg(long, default_value_t = 0.9, allow_negative_numbers = true)]
    beta1: f64,
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    beta3: f64,
    #[arg(long, default_value_t = 10.0, allow_negative_numbers = true)]
    alpha1: f64,
    /// Steps of each simulated run.
    #[arg(long, default_value_t = 100_000)]
    steps: usize,
    /// Draw pictures (PNG and SVG) into this folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum BenchCommand {
    /// Tokens per second of a training step on random tokens, and where its time goes (default: GPT-2 124M).
    Train(BenchTrainArgs),
    /// VRAdam's step beside AdamW's and beside the time that memory needs, on 124M parameters (2.7 GB).
    Optimizer {
        /// Alternated pairs of steps.
        #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
        pairs: u32,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct BenchTrainArgs {
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
    /// f32, or bf16: the operands of the products are rounded to bf16.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    dtype: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Flags that choose a config.
#[derive(Args)]
struct ConfigArgs {
    /// The run's config (TOML); left out: the embedded quickstart.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key, e.g. optimizer.beta3=20; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    assignments: Vec<String>,
}

#[derive(Args)]
struct PretrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The run folder; left out: a fresh runs/<config name>-N.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Continue from the newest valid checkpoint of --run-dir.
    #[arg(long)]
    resume: bool,
    /// No progress, only errors.
    #[arg(long)]
    quiet: bool,
    /// Print one JSON object a step to stdout, with the fields of metrics.jsonl.
    #[arg(long)]
    json_lines: bool,
    /// Print one JSON object about the finished run to stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct GenerateArgs {
    /// A run folder, a checkpoint, a model folder, or a hub id.
    #[arg(value_name = "RUN|MODEL")]
    target: String,
    /// The text to continue.
    #[arg(long, conflicts_with = "prompt_ids", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// The token ids to continue, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "ID,ID,...")]
    prompt_ids: Option<Vec<u32>>,
    /// How many tokens to write at most.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw among the k likeliest tokens only.
    #[arg(long)]
    top_k: Option<usize>,
    /// Draw among the likeliest tokens whose probabilities reach p.
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Stop before this text; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// One JSON object instead of streamed text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ExportArgs {
    /// A run folder or a checkpoint.
    #[arg(value_name = "RUN|CHECKPOINT")]
    target: String,
    /// The folder to write; it must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Of a run with adapters: the whole model with the adapters merged into its (dequantized) base, instead of the
    /// adapters alone in PEFT's format.
    #[arg(long)]
    merge: bool,
}

#[derive(Args)]
struct EvalArgs {
    /// A run folder, a checkpoint, a model folder, or a hub id.
    #[arg(value_name = "RUN|MODEL")]
    target: String,
    /// The task.
    #[arg(long, value_parser = ["perplexity"])]
    task: String,
    /// What to score: a text, jsonl, parquet or .bin file, a folder, or a hub data set.
    #[arg(long, value_name = "FILE|DATASET")]
    data: String,
    /// Which files of a folder or data set; may be given several times.
    #[arg(long, value_name = "GLOB")]
    files: Vec<String>,
    /// Column of the text in parquet and jsonl files.
    #[arg(long, default_value = "text")]
    text_column: String,
    /// Targets of a window; left out: the smaller of the context and 2048.
    #[arg(long)]
    window: Option<usize>,
    /// Score at most this many targets.
    #[arg(long)]
    max_tokens: Option<u64>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DoctorArgs {
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Tokens per second to reckon the time with; left out: measured products of this machine.
    #[arg(long)]
    tokens_per_s: Option<f64>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Parses, runs, reports; the process's exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // clap prints help to stdout (code 0) and mistakes to stderr (code 2).
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("VRTRAIN_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("vrtrain=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match run(cli.command) {
        Ok(Ending::Done) => ExitCode::SUCCESS,
        Ok(Ending::Failed) => ExitCode::from(1),
        Ok(Ending::Interrupted) => ExitCode::from(3),
        Err(error) => {
            eprintln!("error: {error:#}");
            let usage = error.chain().any(|cause| cause.is::<ConfigError>() || cause.is::<crate::optim::ConfigError>());
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<Ending> {
    match command {
        Command::Pretrain(args) => pretrain::run(&pretrain::Options {
            config: config(args.config),
            run_dir: args.run_dir,
            resume: args.resume,
            quiet: args.quiet,
            step_lines: if args.json_lines { StepLines::Json } else { StepLines::None },
            json: args.json,
        }),
        Command::Generate(args) => generate::run(&generate::Options {
            target: args.target,
            prompt: args.prompt,
            prompt_ids: args.prompt_ids,
            max_new_tokens: args.max_new_tokens,
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
            stop: args.stop,
            json: args.json,
        }),
        Command::Export(args) => {
            let form = if args.merge { export::Form::Merged } else { export::Form::AsTrained };
            export::run(&args.target, &args.out, form)
        }
        Command::Eval(args) => eval::run(&eval::Options {
            target: args.target,
            data: args.data,
            files: args.files,
            text_column: args.text_column,
            window: args.window,
            max_tokens: args.max_tokens,
            json: args.json,
        }),
        Command::Bench(BenchCommand::Train(args)) => bench::train(&bench::TrainOptions {
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
            json: args.json,
        }),
        Command::Bench(BenchCommand::Optimizer { pairs, json }) => bench::optimizer(pairs as usize, json),
        Command::Lab(LabCommand::Stability(args)) => lab::stability(&lab::StabilityOptions {
            beta1: args.beta1,
            beta3: args.beta3,
            alpha1: args.alpha1,
            steps: args.steps,
            out: args.out,
            json: args.json,
        }),
        Command::Doctor(args) => doctor::run(args.json),
        Command::Plan(args) => {
            plan::run(&plan::Options { config: config(args.config), tokens_per_s: args.tokens_per_s, json: args.json })
        }
    }
}

/// A size on the command line.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("it must be a whole number".into()),
    }
}

fn config(args: ConfigArgs) -> commands::ConfigChoice {
    commands::ConfigChoice { file: args.config, assignments: args.assignments }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
