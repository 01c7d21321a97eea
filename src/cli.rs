//! The command line: arguments, dispatch, the error chain, exit codes. clap is known here alone.

mod benches;
mod laboratory;
mod shared;

use crate::commands::{Ending, STOPPED_EXIT_CODE, chat, doctor, eval, export, finetune, generate, plan, pretrain};
use crate::commands::{report, runs, watch};
use crate::config::ConfigError;
use crate::train::StepLines;
use anyhow::Context;
use benches::BenchCommand;
use clap::{Args, CommandFactory, Parser, Subcommand};
use laboratory::{CompareArgs, LabCommand, SharpnessArgs, TuneCommand};
use report::Format;
use shared::{ConfigArgs, PrecisionArgs, RunArgs, SamplingArgs};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Pre-train small GPTs and fine-tune LLMs from a terminal, with VRAdam.
///
/// Data goes to stdout, logs and progress to stderr. Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 interrupted
/// and saved, 130 a text stopped by Ctrl-C.
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
    /// Fine-tune a model on prompts with completions or on conversations; without --config the quickstart's own model.
    #[command(after_help = "Examples:\n  \
        vrtrain finetune\n  \
        vrtrain finetune --config configs/smollm2-135m-gsm8k.toml --set optimizer.lr=1e-4 --run-dir runs/b\n  \
        vrtrain finetune --run-dir runs/b --resume")]
    Finetune(PretrainArgs),
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
    #[command(after_help = "Examples:\n  \
        vrtrain eval runs/a --task perplexity --data wiki.test.txt --json\n  \
        vrtrain eval runs/a --task gsm8k --data test.jsonl --shots-from train.jsonl --samples a.jsonl\n  \
        vrtrain eval runs/a --task gsm8k --data test.jsonl --prompt template --limit 100\n  \
        vrtrain eval openai-community/gpt2 --task hellaswag\n  \
        vrtrain eval --compare a.jsonl b.jsonl")]
    Eval(EvalArgs),
    /// Talk with a model through its chat template.
    #[command(after_help = "Examples:\n  \
        vrtrain chat HuggingFaceTB/SmolLM2-135M-Instruct\n  \
        echo 'Why is the sky blue?' | vrtrain chat my-model --temperature 0.7")]
    Chat(ChatArgs),
    /// Check this machine: device, instruction sets, memory, cache, hub, tokenizer.
    #[command(after_help = "Example:\n  vrtrain doctor --json")]
    Doctor(DoctorArgs),
    /// Say what a run would need (parameters, memory, FLOPs, download, time) before any allocation.
    #[command(after_help = "Example:\n  vrtrain plan --config configs/gpt2-124m.toml")]
    Plan(PlanArgs),
    /// Measure this machine: a training step, or the optimizer alone.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Write runs down as one page of charts (the default), as pictures, or as tables.
    #[command(after_help = "Examples:\n  \
        vrtrain report runs/a                       # runs/a/report.html, opens in any browser, needs no network\n  \
        vrtrain report runs/a runs/b --out ab.html\n  \
        vrtrain report runs --svg --png --out figures/all\n  \
        vrtrain report runs/a runs/b --markdown     # to stdout, for a pull request\n  \
        vrtrain report runs/a --csv > a.csv")]
    Report(ReportArgs),
    /// Serve the page of charts live, on 127.0.0.1.
    #[command(after_help = "Examples:\n  vrtrain watch runs/a\n  vrtrain watch runs --port 8000")]
    Watch(WatchArgs),
    /// List the runs below a folder: state, step, loss, speed, last seen.
    #[command(after_help = "Examples:\n  vrtrain runs\n  vrtrain runs studies --json")]
    Runs {
        /// Where to look; left out: runs, or the working directory where there is no such folder.
        #[arg(value_name = "DIR")]
        folder: Option<PathBuf>,
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Print the completions of a shell.
    #[command(after_help = "Examples:\n  \
        vrtrain completions bash > ~/.local/share/bash-completion/completions/vrtrain\n  \
        vrtrain completions zsh > ~/.zfunc/_vrtrain\n  \
        vrtrain completions fish > ~/.config/fish/completions/vrtrain.fish")]
    Completions { shell: clap_complete::Shell },
    /// Write the man pages, one a command.
    #[command(after_help = "Example:\n  vrtrain man --out ~/.local/share/man/man1")]
    Man {
        /// The folder to write into; it is made if it is not there.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Compare optimizers (or whole configs) from the same weights over the same batches, with intervals.
    #[command(after_help = "Examples:\n  \
        vrtrain compare --task gridworld --optimizers vradam,adamw,sgd --seeds 1,2,3 --out grid\n  \
        vrtrain compare --config configs/gpt2-30m-cpu.toml --optimizers vradam,adamw --tuned tuned/best.toml --out pair\n  \
        vrtrain compare --config a.toml --config b.toml --out two\n\n\
        The paper's quality score on OASST2 needs a judge model and is left out. The same command goes on where it was left.")]
    Compare(CompareArgs),
    /// Find learning rates and other keys: a range test, a search, the gate's constants.
    #[command(subcommand)]
    Tune(TuneCommand),
    /// The largest eigenvalues of the loss's Hessian at a run's checkpoints, beside the edges of stability.
    #[command(after_help = "Examples:\n  vrtrain sharpness runs/a\n  vrtrain sharpness runs/a --all --examples 4")]
    Sharpness(SharpnessArgs),
    /// The laboratory: studies in closed form, and runs of the paper's small tasks.
    #[command(subcommand)]
    Lab(LabCommand),
}

#[derive(Args)]
struct PretrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    run: RunArgs,
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
    /// Many prompts, one JSON object a line with `prompt` or `prompt_ids`; writes one JSON object a line, in their order.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_ids"])]
    prompts: Option<PathBuf>,
    /// How many of --prompts are completed at a time (default 16, at most 32); it changes no text.
    #[arg(long)]
    batch: Option<usize>,
    /// How many tokens to write at most.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Seed of the draws (prompt N of --prompts, counted from 0, draws with seed + N).
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Stop before this text; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// One JSON object instead of streamed text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ExportArgs {
    /// A run folder or a checkpoint.
    #[arg(value_name = "RUN|CHECKPOINT")]
    target: String,
    /// The checkpoint of the lowest validation loss instead of the newest.
    #[arg(long)]
    best: bool,
    /// The folder to write; it must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Of a run with adapters: the whole model with the adapters merged into its (dequantized) base, instead of the
    /// adapters alone in PEFT's format.
    #[arg(long)]
    merge: bool,
}

#[derive(Args)]
struct ChatArgs {
    /// A run folder, a checkpoint, a model folder, or a hub id.
    #[arg(value_name = "RUN|MODEL")]
    target: String,
    /// A system message at the beginning of the conversation.
    #[arg(long)]
    system: Option<String>,
    /// How many tokens a reply has at most.
    #[arg(long, default_value_t = 512)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    precision: PrecisionArgs,
}

#[derive(Args)]
struct EvalArgs {
    /// A run folder, a checkpoint, a model folder, or a hub id.
    #[arg(value_name = "RUN|MODEL", required_unless_present = "compare")]
    target: Option<String>,
    /// The task.
    #[arg(long, required_unless_present = "compare", value_parser = ["perplexity", "gsm8k", "hellaswag", "lambada"])]
    task: Option<String>,
    /// McNemar's test on two files that --samples wrote: do they differ in how many they get right?
    #[arg(long, num_args = 2, value_names = ["A.jsonl", "B.jsonl"], conflicts_with_all = ["target", "task", "data", "files", "text_column", "window", "stride",
        "max_tokens", "limit", "prompt", "template", "shots", "shots_from", "seed", "grader", "calculator", "max_new_tokens", "batch", "dtype",
        "samples", "resume"])]
    compare: Option<Vec<PathBuf>>,
    /// What to score: a text, jsonl, parquet or .bin file, a folder, or a hub data set; but for perplexity the task's own
    /// data set on the hub if left out.
    #[arg(long, value_name = "FILE|DATASET")]
    data: Option<String>,
    /// Which files of a folder or data set; may be given several times.
    #[arg(long, value_name = "GLOB")]
    files: Vec<String>,
    /// Column of the text in parquet and jsonl files [default: text].
    #[arg(long)]
    text_column: Option<String>,
    /// perplexity: targets of a window [default: the smaller of the context and 2048].
    #[arg(long)]
    window: Option<usize>,
    /// perplexity: from one window's beginning to the next one's [default: the window, so that none overlap].
    #[arg(long)]
    stride: Option<usize>,
    /// perplexity: score at most this many targets.
    #[arg(long)]
    max_tokens: Option<u64>,
    /// Only the first so many problems.
    #[arg(long)]
    limit: Option<usize>,
    /// gsm8k: as lm-evaluation-harness puts it (harness, cot), in the text of fine-tuning (template), or as a chat turn.
    #[arg(long, value_parser = ["harness", "cot", "template", "chat"])]
    prompt: Option<String>,
    /// gsm8k: the text of --prompt template, with {prompt} in the question's place [default: the run's own, else "Question: {prompt}\nAnswer: "].
    #[arg(long, allow_hyphen_values = true)]
    template: Option<String>,
    /// gsm8k: worked examples before each question [default: 5; cot: 8; template and chat: 0].
    #[arg(long)]
    shots: Option<usize>,
    /// gsm8k: where the examples come from [default: the training part beside --data].
    #[arg(long, value_name = "FILE|DATASET")]
    shots_from: Option<String>,
    /// gsm8k: seed of the examples' choice [default: 1234, as lm-evaluation-harness].
    #[arg(long)]
    seed: Option<u64>,
    /// gsm8k: whose rule says what is right [default: lm-eval, strict and flexible].
    #[arg(long, value_parser = ["lm-eval", "openai"])]
    grader: Option<String>,
    /// gsm8k: fill in the results of <<expressions=, as OpenAI's sampler does.
    #[arg(long)]
    calculator: bool,
    /// gsm8k: tokens of an answer at most [default: 256].
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// gsm8k: problems at a time [default: 16, at most 32]; it changes no answer.
    #[arg(long)]
    batch: Option<usize>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Write one JSON object a problem to this file.
    #[arg(long, value_name = "FILE")]
    samples: Option<PathBuf>,
    /// gsm8k: go on with the problems that the --samples file lacks.
    #[arg(long)]
    resume: bool,
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

/// A number above 0.
fn speed(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(speed) if speed.is_finite() && speed > 0.0 => Ok(speed),
        _ => Err("a number above 0 is wanted".into()),
    }
}

#[derive(Args)]
struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Tokens per second to reckon the time with; left out: measured products of this machine.
    #[arg(long, value_parser = speed)]
    tokens_per_s: Option<f64>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ReportArgs {
    /// Run folders, or folders of runs.
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The file to write; with several formats each takes its own extension. Left out: report.EXTENSION in the folder of
    /// a single run, else in the working directory; tables go to stdout.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// One page of charts that holds all it needs (the default).
    #[arg(long)]
    html: bool,
    /// Six panels as a vector picture.
    #[arg(long)]
    svg: bool,
    /// Six panels as a picture.
    #[arg(long)]
    png: bool,
    /// A table of the runs, and one of the settings in which they differ.
    #[arg(long)]
    markdown: bool,
    /// Every step of every run, all digits.
    #[arg(long)]
    csv: bool,
}

impl ReportArgs {
    fn formats(&self) -> Vec<Format> {
        let asked = [
            (self.html, Format::Html),
            (self.svg, Format::Svg),
            (self.png, Format::Png),
            (self.markdown, Format::Markdown),
            (self.csv, Format::Csv),
        ];
        let formats: Vec<Format> = asked.into_iter().filter(|(asked, _)| *asked).map(|(_, format)| format).collect();
        if formats.is_empty() { vec![Format::Html] } else { formats }
    }
}

#[derive(Args)]
struct WatchArgs {
    /// Run folders, or folders of runs; new runs in them appear by themselves.
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The address to listen on. Anything but a loopback address opens the page to others.
    #[arg(long, value_name = "ADDRESS")]
    host: Option<IpAddr>,
    /// The port to listen on, 0 for any; left out: 7077, or any where that one is taken.
    #[arg(long)]
    port: Option<u16>,
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
        Ok(Ending::Stopped) => ExitCode::from(STOPPED_EXIT_CODE),
        Err(error) => {
            eprintln!("error: {error:#}");
            let usage = error.chain().any(|cause| cause.is::<ConfigError>() || cause.is::<crate::optim::ConfigError>());
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<Ending> {
    match command {
        Command::Pretrain(args) => pretrain::run(&training(args, pretrain::Stage::Pretrain)),
        Command::Finetune(args) => finetune::run(training(args, pretrain::Stage::Finetune)),
        Command::Generate(GenerateArgs { sampling, .. }) | Command::Chat(ChatArgs { sampling, .. })
            if sampling.unused().is_some() =>
        {
            let flag = sampling.unused().unwrap_or_default();
            let message = "it has no effect at --temperature 0, which is greedy: give a temperature above 0";
            Err(ConfigError::flag(flag, message).into())
        }
        Command::Generate(args) => generate::run(&generate::Options {
            target: args.target,
            prompt: args.prompt,
            prompt_ids: args.prompt_ids,
            prompts: args.prompts,
            batch: args.batch,
            max_new_tokens: args.max_new_tokens,
            temperature: args.sampling.temperature,
            top_k: args.sampling.top_k,
            top_p: args.sampling.top_p,
            seed: args.seed,
            stop: args.stop,
            precision: args.precision.precision(),
            json: args.json,
        }),
        Command::Export(args) => {
            let choice = if args.best { export::Choice::Best } else { export::Choice::Newest };
            let form = if args.merge { export::Form::Merged } else { export::Form::AsTrained };
            export::run(&args.target, choice, form, &args.out)
        }
        Command::Eval(args) => evaluate(args),
        Command::Chat(args) => chat::run(&chat::Options {
            target: args.target,
            system: args.system,
            max_new_tokens: args.max_new_tokens,
            temperature: args.sampling.temperature,
            top_k: args.sampling.top_k,
            top_p: args.sampling.top_p,
            seed: args.seed,
            precision: args.precision.precision(),
        }),
        Command::Bench(command) => benches::bench(command),
        Command::Compare(args) => laboratory::compare(args),
        Command::Tune(command) => laboratory::tune(command),
        Command::Sharpness(args) => laboratory::sharpness(args),
        Command::Lab(command) => laboratory::lab(command),
        Command::Doctor(args) => doctor::run(args.json),
        Command::Report(args) => {
            report::run(&report::Options { formats: args.formats(), runs: args.runs, out: args.out })
        }
        Command::Watch(args) => watch::run(&watch::Options { runs: args.runs, host: args.host, port: args.port }),
        Command::Runs { folder, json } => runs::run(folder, json),
        Command::Completions { shell } => completions(shell),
        Command::Man { out } => man_pages(&out),
        Command::Plan(args) => {
            plan::run(&plan::Options { config: args.config.choice(), tokens_per_s: args.tokens_per_s, json: args.json })
        }
    }
}

fn evaluate(args: EvalArgs) -> anyhow::Result<Ending> {
    if let Some([first, second]) = args.compare.as_deref() {
        return eval::compare(first, second, args.json);
    }
    let (Some(target), Some(task)) = (args.target, args.task) else {
        anyhow::bail!(ConfigError::flag("--task", "name a run or model and a task, or two files to --compare"));
    };
    eval::run(&eval::Options {
        target,
        task: match task.as_str() {
            "gsm8k" => eval::Task::Gsm8k,
            "hellaswag" => eval::Task::HellaSwag,
            "lambada" => eval::Task::Lambada,
            _ => eval::Task::Perplexity,
        },
        data: args.data,
        files: args.files,
        text_column: args.text_column,
        window: args.window,
        stride: args.stride,
        max_tokens: args.max_tokens,
        limit: args.limit,
        prompt: args.prompt.as_deref().map(|word| match word {
            "cot" => eval::PromptStyle::ChainOfThought,
            "template" => eval::PromptStyle::Template,
            "chat" => eval::PromptStyle::Chat,
            _ => eval::PromptStyle::Harness,
        }),
        template: args.template,
        shots: args.shots,
        shots_from: args.shots_from,
        seed: args.seed,
        grader: args.grader.as_deref().map(|word| match word {
            "openai" => eval::Grader::OpenAi,
            _ => eval::Grader::Harness,
        }),
        calculator: args.calculator,
        max_new_tokens: args.max_new_tokens,
        batch: args.batch,
        precision: args.precision.precision(),
        samples: args.samples,
        resume: args.resume,
        json: args.json,
    })
}

fn training(args: PretrainArgs, stage: pretrain::Stage) -> pretrain::Options {
    pretrain::Options {
        stage,
        config: args.config.choice(),
        run_dir: args.run.run_dir,
        resume: args.run.resume,
        quiet: args.run.quiet,
        step_lines: if args.json_lines { StepLines::Json } else { StepLines::None },
        json: args.json,
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<Ending> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vrtrain", &mut script);
    std::io::stdout().write_all(&script).context("cannot write to stdout")?;
    Ok(Ending::Done)
}

fn man_pages(folder: &Path) -> anyhow::Result<Ending> {
    let write = || {
        std::fs::create_dir_all(folder)?;
        clap_mangen::generate_to(Cli::command(), folder)
    };
    write().with_context(|| format!("cannot write the man pages into {}", folder.display()))?;
    eprintln!("wrote the man pages into {}", folder.display());
    Ok(Ending::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn check(command: &clap::Command) {
            command.get_subcommands().for_each(check);
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let name = command.get_name();
            assert!(command.has_subcommands() || help.contains("vrtrain "), "{name} has no example");
        }
        Cli::command().get_subcommands().for_each(check);
    }
}
