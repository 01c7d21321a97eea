//! `vrtrain doctor`: what this machine offers to a run, and what would stop one.

use super::{Ending, print_json};
use crate::data::TextTokenizer;
use crate::hub::{Hub, Mode, RepoId, RepoKind, Settings};
use crate::ops::product::{Into, Operand, Precision, Size, Threads, multiply_in};
use crate::train::GIB;
use anyhow::Result;
use serde_json::json;
use std::time::{Duration, Instant};

/// How long the hub may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// How a check ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Worth knowing; nothing fails.
    Note,
    Bad,
}

struct Check {
    name: &'static str,
    verdict: Verdict,
    finding: String,
}

fn check(name: &'static str, verdict: Verdict, finding: impl std::convert::Into<String>) -> Check {
    Check { name, verdict, finding: finding.into() }
}

/// Runs all checks; [`Ending::Failed`] when one is bad.
pub fn run(json: bool) -> Result<Ending> {
    let checks = [device(), instruction_sets(), threads(), memory(), cache(), hub(), token(), tokenizer()];
    let bad = checks.iter().any(|check| check.verdict == Verdict::Bad);
    let word = |verdict| match verdict {
        Verdict::Good => "ok",
        Verdict::Note => "note",
        Verdict::Bad => "bad",
    };
    if json {
        let entries = checks.iter().map(|c| json!({"check": c.name, "verdict": word(c.verdict), "finding": c.finding}));
        print_json(&json!({ "ok": !bad, "checks": entries.collect::<Vec<_>>() }))?;
    } else {
        checks.iter().for_each(|c| println!("{:<5} {:<17} {}", word(c.verdict), c.name, c.finding));
    }
    Ok(if bad { Ending::Failed } else { Ending::Done })
}

fn device() -> Check {
    if cfg!(feature = "cuda") {
        return match super::device::open(0) {
            Ok(_) => check("device", Verdict::Good, "cuda:0 opens; train.device = \"auto\" takes it"),
            Err(why) => check("device", Verdict::Note, format!("the CPU: built for CUDA, but {why}")),
        };
    }
    let hint = "the CPU: this vrtrain is built without CUDA (build with --features cuda; such a binary needs \
                libcuda.so.1, which the driver brings, to start at all)";
    check("device", Verdict::Good, hint)
}

/// The instruction sets that our kernels can use, best first.
fn instruction_sets() -> Check {
    #[cfg(target_arch = "x86_64")]
    {
        let sets = [
            ("AVX512-BF16", is_x86_feature_detected!("avx512bf16")),
            ("AVX-512", is_x86_feature_detected!("avx512f")),
            ("AVX2", is_x86_feature_detected!("avx2")),
            ("FMA", is_x86_feature_detected!("fma")),
        ];
        let found: Vec<&str> = sets.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
        if found.contains(&"AVX2") && found.contains(&"FMA") {
            return check("instruction sets", Verdict::Good, found.join(", "));
        }
        check("instruction sets", Verdict::Note, "no AVX2 and FMA: the portable kernels will run, slowly")
    }
    #[cfg(not(target_arch = "x86_64"))]
    check("instruction sets", Verdict::Note, format!("{}: the portable kernels will run", std::env::consts::ARCH))
}

/// Products of this machine in FLOP/s: the best of several short ones on all threads.
pub fn measured_flops_per_s(precision: Precision) -> f64 {
    const N: usize = 768;
    let (a, b, mut c) = (vec![0.5f32; N * N], vec![0.25f32; N * N], vec![0f32; N * N]);
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        let started = Instant::now();
        let (left, right) = (Operand::row_major(&a, N), Operand::row_major(&b, N));
        let size = Size { m: N, k: N, n: N };
        multiply_in(precision, Threads::All, size, left, right, 1.0, &mut c, N, Into::Overwrite);
        best = best.min(started.elapsed().as_secs_f64());
    }
    std::hint::black_box(&c);
    2.0 * (N as f64).powi(3) / best
}

fn threads() -> Check {
    let speed = measured_flops_per_s(Precision::F32) / 1e9;
    let finding = format!(
        "{} (RAYON_NUM_THREADS changes it); products at {speed:.0} GFLOP/s in f32",
        rayon::current_num_threads()
    );
    check("threads", Verdict::Good, finding)
}

fn memory() -> Check {
    let mut system = match sysinfo::System::new() {
        Ok(system) => system,
        Err(error) => return check("memory", Verdict::Note, format!("not known: {error}")),
    };
    system.refresh_memory();
    let (available, total) = (system.available_memory() as f64 / GIB, system.total_memory() as f64 / GIB);
    let verdict = if available < 1.0 { Verdict::Note } else { Verdict::Good };
    check("memory", verdict, format!("{available:.1} GiB available of {total:.1} GiB"))
}

fn cache() -> Check {
    let hub = match Hub::from_env() {
        Ok(hub) => hub,
        Err(error) => return check("cache", Verdict::Bad, format!("{error}")),
    };
    let folder = &hub.settings().home;
    let writable = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
    match writable {
        Ok(_) => check("cache", Verdict::Good, format!("{} is writable", folder.display())),
        Err(error) => {
            check("cache", Verdict::Bad, format!("{} is not writable: {error}; set HF_HOME", folder.display()))
        }
    }
}

fn hub() -> Check {
    // A person waits for the answer: one short try instead of the patience that a run has.
    let quick = |mut settings: Settings| {
        (settings.retry.connect_patience, settings.retry.first_patience) = (PATIENCE, PATIENCE);
        Hub::new(settings)
    };
    let hub = match Settings::from_env().and_then(quick) {
        Ok(hub) => hub,
        Err(error) => return check("hub", Verdict::Bad, format!("{error}")),
    };
    if hub.settings().mode == Mode::Offline {
        return check("hub", Verdict::Note, "HF_HUB_OFFLINE is set: only what is cached can be used");
    }
    let endpoint = &hub.settings().endpoint;
    let answer = RepoId::parse(RepoKind::Model, "openai-community/gpt2").and_then(|repo| hub.list(&repo));
    match answer {
        Ok(_) => check("hub", Verdict::Good, format!("{endpoint} answers")),
        Err(error) => check("hub", Verdict::Note, format!("{endpoint}: {error}")),
    }
}

fn token() -> Check {
    match Hub::from_env() {
        Ok(hub) if hub.settings().token_source().is_some() => {
            check("token", Verdict::Good, "a Hugging Face token is set")
        }
        _ => check("token", Verdict::Note, "no HF_TOKEN and no token file: gated repositories will refuse"),
    }
}

fn tokenizer() -> Check {
    let text = "Tom buys 6*4=<<6*4=24>>24 apples. \u{1f34e}";
    let outcome = crate::quickstart::corpus::generate(1, 2000, 0).map_err(anyhow::Error::from).and_then(|corpus| {
        let documents: Vec<String> = corpus.training.iter().map(|problem| problem.document()).collect();
        let trained = crate::quickstart::tokenizer::train(documents.iter().map(String::as_str))?;
        let tokenizer = TextTokenizer::new(trained, crate::quickstart::tokenizer::END_OF_TEXT_ID)?;
        tokenizer.decode(&tokenizer.encode(text)?)
    });
    match outcome {
        Ok(again) if again == text => check("tokenizer", Verdict::Good, "a byte-level BPE trains and round-trips"),
        Ok(again) => check("tokenizer", Verdict::Bad, format!("{text:?} came back as {again:?}")),
        Err(error) => check("tokenizer", Verdict::Bad, format!("{error:#}")),
    }
}
