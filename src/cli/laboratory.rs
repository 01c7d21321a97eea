//! Arguments of the laboratory's commands: compare, tune, sharpness, lab.

use super::shared::RunArgs;
use crate::commands::{Ending, compare, lab, sharpness, task, tokenizer, tune};
use crate::lab::study::EarlyStop;
use anyhow::Result;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct CompareArgs {
    /// A task that has a config of its own: wikitext2, cifar10-resnet32, cifar10-cnn, gridworld, gpt2, gsm8k, oasst2.
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// A config; with several, whole configs are compared.
    #[arg(long = "config", value_name = "FILE")]
    configs: Vec<PathBuf>,
    /// Override one key of every run; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    assignments: Vec<String>,
    /// Optimizers to compare on one config; each has its defaults, and the config's own the config's keys.
    #[arg(long, value_delimiter = ',', value_name = "NAME,NAME,...")]
    optimizers: Vec<String>,
    /// Override one key of one optimizer's runs, e.g. sgd:optimizer.lr=0.1.
    #[arg(long = "set-for", value_name = "OPTIMIZER:SECTION.KEY=VALUE")]
    own_assignments: Vec<String>,
    /// Take an optimizer's keys from a best.toml of `tune search`; may be given several times.
    #[arg(long, value_name = "FILE")]
    tuned: Vec<PathBuf>,
    /// Seeds of weights and data.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3", value_name = "N,N,...")]
    seeds: Vec<u64>,
    /// Whom the others are compared with; left out: adamw, or else the first.
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,
    /// Runs side by side; the threads are divided among them.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// The folder for runs, results and pictures.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The results as one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
pub(super) enum TuneCommand {
    /// Learning-rate range test: the rate climbs over one short run, and the loss shows where it learns and diverges.
    #[command(after_help = "Example:\n  vrtrain tune lr --task gridworld --optimizer adamw --out range")]
    Lr(TuneLrArgs),
    /// beta3 and alpha1 from the velocities of a short run.
    #[command(after_help = "Example:\n  vrtrain tune gate --config configs/gpt2-30m-cpu.toml --steps 100 --out gate")]
    Gate(TuneGateArgs),
    /// Bayesian optimisation (a tree-structured Parzen estimator) of config keys on the validation loss.
    #[command(after_help = "Example:\n  \
        vrtrain tune search --task gridworld --optimizer vradam --trials 24 --workers 2 --out tuned \\\n    \
        --range optimizer.lr=1e-5..1e-2:log --range optimizer.beta3=0.1..1.5 --range optimizer.alpha1=3..30:integer\n\n\
        Without --range: the learning rate over the paper's range, and for vradam beta3 and alpha1 over theirs. The same \
        command goes on where a study was left.")]
    Search(TuneSearchArgs),
}

/// What is tuned.
#[derive(Args)]
pub(super) struct SubjectArgs {
    /// A task that has a config of its own: wikitext2, cifar10-resnet32, cifar10-cnn, gridworld, gpt2, gsm8k, oasst2.
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    assignments: Vec<String>,
    /// Another optimizer than the config's, with its defaults.
    #[arg(long, value_name = "NAME")]
    optimizer: Option<String>,
    /// The folder for runs and results.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct TuneLrArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    #[arg(long, default_value_t = 1e-6)]
    from: f64,
    #[arg(long, default_value_t = 1.0)]
    to: f64,
    #[arg(long, default_value_t = 200)]
    steps: u64,
}

#[derive(Args)]
pub(super) struct TuneGateArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    #[arg(long, default_value_t = 100)]
    steps: u64,
}

#[derive(Args)]
pub(super) struct TuneSearchArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// A key and its range; may be given several times.
    #[arg(long = "range", value_name = "KEY=LOW..HIGH[:log|:integer]")]
    ranges: Vec<String>,
    /// How many trials the study has in all.
    #[arg(long, default_value_t = 24)]
    trials: usize,
    /// Seed of the search; the runs' own is in the config.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Trials side by side; part of the study, since the next are chosen after all of them.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// median: give a trial up when its validation loss is above the median of finished trials at that step.
    #[arg(long, default_value = "median", value_parser = ["none", "median"])]
    early_stop: String,
}

#[derive(Args)]
pub(super) struct SharpnessArgs {
    /// A run folder or one of its checkpoints.
    #[arg(value_name = "RUN|CHECKPOINT")]
    run: PathBuf,
    /// Every checkpoint that the run has kept, with a picture.
    #[arg(long)]
    all: bool,
    /// Rows (images, walks) of the training data that the loss is taken of.
    #[arg(long, default_value_t = 8)]
    examples: usize,
    /// Lanczos iterations.
    #[arg(long, default_value_t = 30)]
    iterations: usize,
    /// How many eigenvalues to show.
    #[arg(long, default_value_t = 3)]
    top: usize,
    /// Tokens of a row; left out: the run's.
    #[arg(long)]
    sequence_length: Option<usize>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
pub(super) enum LabCommand {
    /// Where momentum with a velocity gate is stable, bounded, or cycles: on a quadratic and on Rosenbrock's function.
    #[command(after_help = "Example:\n  vrtrain lab stability --out stability")]
    Stability(StabilityArgs),
    /// Train a byte-level BPE on texts, for small studies: tokenizer.source takes the folder.
    #[command(
        after_help = "Example:\n  vrtrain lab tokenizer --data wiki.train.txt --vocabulary 4096 --out wiki-tokenizer"
    )]
    Tokenizer(TokenizerArgs),
    /// One run of a small task (configs/lab), with the run folder and exit codes of pretrain.
    #[command(
        after_help = "Example:\n  vrtrain lab train --config configs/lab/gridworld.toml --set task.sharpness_every=100"
    )]
    Train(TaskArgs),
}

#[derive(Args)]
pub(super) struct StabilityArgs {
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

#[derive(Args)]
pub(super) struct TokenizerArgs {
    /// Texts: a file, a folder or a hub data set.
    #[arg(long, value_name = "FILE|DATASET")]
    data: String,
    /// Which files of a folder or data set; may be given several times.
    #[arg(long, value_name = "GLOB")]
    files: Vec<String>,
    #[arg(long, default_value = "text")]
    text_column: String,
    #[arg(long, default_value_t = 4096)]
    vocabulary: usize,
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Args)]
pub(super) struct TaskArgs {
    /// The task's config (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    assignments: Vec<String>,
    #[command(flatten)]
    run: RunArgs,
    /// Print one JSON object about the finished run to stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn compare(args: CompareArgs) -> Result<Ending> {
    compare::run(&compare::Options {
        task: args.task,
        configs: args.configs,
        assignments: args.assignments,
        optimizers: args.optimizers,
        own_assignments: args.own_assignments,
        tuned: args.tuned,
        seeds: args.seeds,
        baseline: args.baseline,
        workers: args.workers,
        out: args.out,
        json: args.json,
    })
}

pub(super) fn sharpness(args: SharpnessArgs) -> Result<Ending> {
    sharpness::run(&sharpness::Options {
        run: args.run,
        all: args.all,
        examples: args.examples,
        iterations: args.iterations,
        count: args.top,
        sequence_length: args.sequence_length,
        json: args.json,
    })
}

pub(super) fn lab(command: LabCommand) -> Result<Ending> {
    match command {
        LabCommand::Stability(args) => lab::stability(&lab::StabilityOptions {
            beta1: args.beta1,
            beta3: args.beta3,
            alpha1: args.alpha1,
            steps: args.steps,
            out: args.out,
            json: args.json,
        }),
        LabCommand::Tokenizer(args) => tokenizer::run(&tokenizer::Options {
            data: args.data,
            files: args.files,
            text_column: args.text_column,
            vocabulary: args.vocabulary,
            out: args.out,
        }),
        LabCommand::Train(args) => task::run(&task::Options {
            config: args.config,
            assignments: args.assignments,
            run_dir: args.run.run_dir,
            resume: args.run.resume,
            quiet: args.run.quiet,
            json: args.json,
        }),
    }
}

pub(super) fn tune(command: TuneCommand) -> Result<Ending> {
    let subject = |args: SubjectArgs| {
        let SubjectArgs { task, config, assignments, optimizer, out, json } = args;
        (tune::Subject { task, config, assignments, optimizer }, out, json)
    };
    match command {
        TuneCommand::Lr(args) => {
            let (subject, out, json) = subject(args.subject);
            tune::range(&tune::RangeOptions { subject, from: args.from, to: args.to, steps: args.steps, out, json })
        }
        TuneCommand::Gate(args) => {
            let (subject, out, json) = subject(args.subject);
            tune::gate(&tune::GateOptions { subject, steps: args.steps, out, json })
        }
        TuneCommand::Search(args) => {
            let (subject, out, json) = subject(args.subject);
            let median = args.early_stop == "median";
            tune::search(&tune::SearchOptions {
                subject,
                ranges: args.ranges,
                trials: args.trials,
                seed: args.seed,
                workers: args.workers,
                early_stop: if median { EarlyStop::Median } else { EarlyStop::None },
                out,
                json,
            })
        }
    }
}
