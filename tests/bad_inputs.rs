//! Bad input gets a clear error (what, where, what to do) and leaves nothing half-written.

mod common;

use common::*;
use std::path::Path;
use std::process::Command;

/// The command fails with `code`, says all of `words`, and makes no run folder.
fn refuses(command: &mut Command, run_folder: &Path, code: i32, words: &[&str]) {
    let output = run(command);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
    assert!(!run_folder.exists(), "{} was made", run_folder.display());
}

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a scratch folder") }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("a scratch file");
        path
    }

    fn run_folder(&self) -> std::path::PathBuf {
        self.path("run")
    }

    fn pretrain(&self, settings: &[&str]) -> Command {
        let config = small_config(self.folder.path(), 4, 2);
        let mut command = vrtrain();
        command.current_dir(self.folder.path());
        command.args(["pretrain", "--config"]).arg(config).arg("--run-dir").arg(self.run_folder());
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        command
    }
}

#[test]
fn a_missing_file_a_typo_and_a_conflict_are_config_errors() {
    let case = Case::new();
    let missing = run(vrtrain().args(["pretrain", "--config", "/no/such.toml"]));
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).contains("/no/such.toml"));
    let folder = case.run_folder();
    refuses(&mut case.pretrain(&["data.source='gone.bin'"]), &folder, 2, &["data.source", "gone.bin"]);
    refuses(&mut case.pretrain(&["optimizer.beta4=1"]), &folder, 2, &["beta4", "beta3"]);
    refuses(&mut case.pretrain(&["train.stepz=1"]), &folder, 2, &["train.stepz", "train.steps"]);
    refuses(&mut case.pretrain(&["train.steps=many"]), &folder, 2, &["train.steps"]);
    // One stands in place of the config's own length; two of them conflict.
    let twice = ["train.tokens=5", "train.steps=9"];
    refuses(&mut case.pretrain(&twice), &folder, 2, &["train.tokens", "train.steps", "conflicts"]);
    refuses(&mut case.pretrain(&["optimizer.name=vradm"]), &folder, 2, &["vradm", "vradam"]);
    refuses(&mut case.pretrain(&["optimizer.name=VRAdam"]), &folder, 2, &["did you mean \"vradam\""]);
    refuses(&mut case.pretrain(&["optimizer.lr=-1"]), &folder, 2, &["lr"]);
    // 0 in f32, which would divide 0 by 0.
    refuses(&mut case.pretrain(&["optimizer.eps=1e-50"]), &folder, 2, &["eps", "f32"]);
    // Infinite in f32.
    refuses(&mut case.pretrain(&["optimizer.weight_decay=1e39"]), &folder, 2, &["weight_decay", "f32"]);
    refuses(&mut case.pretrain(&["train.grad_clip=-1"]), &folder, 2, &["train.grad_clip", "from 0 (0: off)"]);
    refuses(&mut case.pretrain(&["train.sequence_length=64"]), &folder, 2, &["sequence_length"]);
    refuses(&mut case.pretrain(&["schedule.warmup_steps=-1"]), &folder, 2, &["warmup_steps"]);
    refuses(
        &mut case.pretrain(&["train.device=cuda:0"]),
        &folder,
        if cfg!(feature = "cuda") { 1 } else { 2 },
        &["cuda"],
    );
    case.write("typo.toml", b"[train]\nstepps = 3\n");
    let output = run(vrtrain().current_dir(case.folder.path()).args(["pretrain", "--config", "typo.toml"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("typo.toml:2") && stderr(&output).contains("did you mean `train.steps`"));
}

#[test]
fn an_optimizer_key_that_another_makes_idle_is_told_once_and_does_not_stop_a_sweep() {
    let case = Case::new();
    let lines = |output: &std::process::Output| {
        stderr(output).lines().filter(|line| line.starts_with("warning: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    // As in a sweep over beta3 with another key of the gate in the config; told even where all else is quiet.
    let output = succeed(case.pretrain(&["optimizer.alpha1=5", "optimizer.beta3=0", "train.steps=2"]).arg("--quiet"));
    let told = lines(&output);
    assert_eq!(told.len(), 1, "{told:?}");
    for word in ["--set optimizer.alpha1=5", "`optimizer.alpha1` has no effect while `optimizer.beta3` is 0"] {
        assert!(told[0].contains(word), "{told:?}");
    }
    let stored = std::fs::read_to_string(case.run_folder().join("config.toml")).expect("a config");
    assert!(stored.contains("beta3 = 0.0") && !stored.contains("alpha1"), "{stored}");

    // Taken up: nothing has been given now. The config of an earlier version, with every key, is the same run.
    let mut resume = vrtrain();
    resume.args(["pretrain", "--resume", "--set", "train.steps=3", "--run-dir"]).arg(case.run_folder());
    assert_eq!(lines(&succeed(&mut resume)), [""; 0]);
    let path = case.run_folder().join("config.toml");
    std::fs::write(&path, stored.replace("beta3 = 0.0", "beta3 = 0.0\nalpha1 = 5.0\ngate_power = 2.0"))
        .expect("a config");
    let mut resume = vrtrain();
    resume.args(["pretrain", "--resume", "--set", "train.steps=4", "--run-dir"]).arg(case.run_folder());
    succeed(&mut resume);
    assert_eq!(metrics(&case.run_folder()).len(), 4);

    let plan = |settings: &[&str]| {
        let mut command = vrtrain();
        command.args(["plan", "--json", "--tokens-per-s", "1", "--config"]).arg(small_config(case.folder.path(), 4, 2));
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        lines(&succeed(&mut command)).len()
    };
    assert_eq!(plan(&["optimizer.beta3=0"]), 0);
    assert_eq!(plan(&["optimizer.alpha1=0"]), 1);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_card_is_refused_by_a_build_that_has_no_use_for_one() {
    let case = Case::new();
    let words = ["built without CUDA", "--features cuda"];
    refuses(&mut case.pretrain(&["train.device=cuda:0"]), &case.run_folder(), 2, &["train.device", words[0], words[1]]);
    let mut bench = vrtrain();
    bench.args(["bench", "optimizer", "--device", "cuda:0"]);
    refuses(&mut bench, &case.run_folder(), 2, &["--device", words[0], words[1]]);
}

#[test]
fn tf32_is_for_cards() {
    let case = Case::new();
    let words = ["--set train.dtype=tf32", "only a CUDA card", "\"f32\""];
    refuses(&mut case.pretrain(&["train.dtype=tf32", "train.device=cpu"]), &case.run_folder(), 2, &words);
    let mut bench = vrtrain();
    bench.args(["bench", "train", "--dtype", "tf32"]);
    refuses(&mut bench, &case.run_folder(), 2, &["--dtype", "only a CUDA card"]);
}

#[test]
fn a_model_that_is_not_there_cannot_be_benched() {
    let mut bench = vrtrain();
    bench.args(["bench", "train", "--init", "/no/such/model"]);
    refuses(&mut bench, &Case::new().run_folder(), 2, &["--init", "/no/such/model"]);
}

#[test]
fn torn_empty_and_foreign_data_are_named() {
    let case = Case::new();
    let folder = case.run_folder();
    case.write("torn.parquet", b"PAR1 this is not the end");
    case.write("empty.bin", b"");
    case.write("odd.bin", &[1, 0, 2]);
    case.write("large.bin", &[255u8; 4096]);
    case.write("bad.jsonl", b"{\"text\": \"a\"}\n{\"text\": \n");
    case.write("column.jsonl", b"{\"body\": \"a\"}\n");
    case.write("good.jsonl", b"{\"text\": \"a good line\"}\n");
    case.write("short.bin", &[1, 0, 2, 0]);
    let tokenizer = fixture_tokenizer(&case);
    let with_tokenizer = format!("tokenizer.source='{tokenizer}'");
    let vocabulary = "model.vocab_size=2000";
    let source = |name: &str| format!("data.source='{name}'");
    refuses(&mut case.pretrain(&[&source("torn.parquet"), &with_tokenizer, vocabulary]), &folder, 1, &["torn.parquet"]);
    refuses(&mut case.pretrain(&[&source("empty.bin")]), &folder, 1, &["empty.bin", "empty"]);
    refuses(&mut case.pretrain(&[&source("odd.bin")]), &folder, 1, &["odd.bin", "odd"]);
    refuses(&mut case.pretrain(&[&source("large.bin")]), &folder, 1, &["large.bin", "65535", "256"]);
    refuses(&mut case.pretrain(&[&source("short.bin")]), &folder, 1, &["short.bin"]);
    refuses(&mut case.pretrain(&[&source("bad.jsonl"), &with_tokenizer, vocabulary]), &folder, 1, &["bad.jsonl", "2"]);
    refuses(
        &mut case.pretrain(&[&source("column.jsonl"), &with_tokenizer, vocabulary]),
        &folder,
        1,
        &["column.jsonl", "text"],
    );
    refuses(&mut case.pretrain(&[&source("good.jsonl")]), &folder, 1, &["tokenizer"]);
    std::fs::create_dir(case.path("nothing")).expect("a scratch folder");
    refuses(&mut case.pretrain(&[&source("nothing")]), &folder, 1, &["nothing"]);
}

/// A small tokenizer, made by the binary's own quickstart.
fn fixture_tokenizer(case: &Case) -> String {
    let run = case.path("tokenizer-run");
    succeed(
        vrtrain()
            .args(["pretrain", "--quiet", "--set", "train.steps=1", "--set", "train.micro_batch=1"])
            .args([
                "--set",
                "train.tokens_per_step=256",
                "--set",
                "train.eval_every=0",
                "--set",
                "train.sample_every=0",
                "--set",
                "model.n_layer=1",
                "--run-dir",
            ])
            .arg(&run),
    );
    run.join("model/tokenizer.json").display().to_string()
}

#[test]
fn a_vocabulary_larger_than_the_models_is_refused() {
    let case = Case::new();
    let tokenizer = fixture_tokenizer(&case);
    let text = case.write("text.txt", b"Tom has 3 apples and buys 4 more. How many apples does he have now?\n");
    let settings = [format!("tokenizer.source='{tokenizer}'"), format!("data.source='{}'", text.display())];
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    refuses(&mut case.pretrain(&settings), &case.run_folder(), 2, &["256", "model.vocab_size"]);
}

#[test]
fn poisoned_and_foreign_weights_are_refused() {
    let case = Case::new();
    let model = case.path("model");
    std::fs::create_dir(&model).expect("a scratch folder");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("gpt-nano-sort").join(name), model.join(name)).expect("the fixture is there");
    }
    let weights = model.join("model.safetensors");
    let good = std::fs::read(&weights).expect("the weights");
    let mut poisoned = good.clone();
    let place = poisoned.len() - 4;
    poisoned[place..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, &poisoned).expect("the weights can be changed");
    let generate = |words: &[&str]| {
        let output = run(vrtrain().arg("generate").arg(&model).args(["--prompt-ids", "0,1"]));
        assert_eq!(output.status.code(), Some(1));
        words.iter().for_each(|word| assert!(stderr(&output).contains(word), "{}", stderr(&output)));
    };
    generate(&["NaN", "poisoned"]);
    std::fs::write(&weights, &good[..good.len() - 100]).expect("the weights can be changed");
    generate(&["torn"]);
    std::fs::write(&weights, &good).expect("the weights can be changed");
    let config = std::fs::read_to_string(model.join("config.json")).expect("the config");
    std::fs::write(model.join("config.json"), config.replace("\"n_embd\": 48", "\"n_embd\": 24")).expect("writable");
    generate(&["shape", "another model"]);
}

#[test]
fn a_checkpoint_of_another_model_is_refused_on_resume() {
    let case = Case::new();
    succeed(case.pretrain(&[]).arg("--quiet"));
    let other = case.path("other");
    let config = small_config(case.folder.path(), 4, 2);
    let mut narrower = vrtrain();
    narrower.args(["pretrain", "--quiet", "--set", "model.n_embd=16", "--config"]).arg(config);
    succeed(narrower.arg("--run-dir").arg(&other));
    let (from, to) = (other.join("checkpoints"), case.run_folder().join("checkpoints"));
    std::fs::remove_dir_all(&to).expect("ours");
    std::fs::rename(from, to).expect("a checkpoint can be moved");
    let mut command = case.pretrain(&["train.steps=9"]);
    let output = run(command.arg("--resume"));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("another model"), "{}", stderr(&output));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_no_half_written_checkpoint() {
    let mount = tempfile::tempdir().expect("a scratch folder");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=600k", "none"]).arg(mount.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipping a_full_disk_leaves_no_half_written_checkpoint: no right to mount a tmpfs");
        return;
    }
    let case = Case::new();
    let path = mount.path().join("run");
    let config = small_config(case.folder.path(), 4, 2);
    let output = run(vrtrain().args(["pretrain", "--config"]).arg(config).arg("--run-dir").arg(&path));
    let text = stderr(&output);
    let leftovers: Vec<_> = std::fs::read_dir(path.join("checkpoints")).map_or(Vec::new(), |entries| {
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    });
    let unmounted = Command::new("umount").arg(mount.path()).status();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("No space left") && text.contains("checkpoint"), "{text}");
    assert!(leftovers.iter().all(|name| !name.ends_with(".tmp")), "{leftovers:?}");
    assert!(unmounted.is_ok_and(|status| status.success()));
}

#[test]
fn a_run_folder_that_cannot_be_written_is_refused() {
    let case = Case::new();
    // A file where the folder should be: refused for everyone, root too.
    case.write("taken", b"");
    let config = small_config(case.folder.path(), 4, 2);
    let output = run(vrtrain().args(["pretrain", "--config"]).arg(config).arg("--run-dir").arg(case.path("taken/run")));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("taken"), "{}", stderr(&output));
}

#[test]
fn a_file_is_read_once_and_what_validates_is_not_trained_on() {
    let case = Case::new();
    let folder = case.run_folder();
    let tokens: Vec<u8> = (0..6000u32).flat_map(|i| ((i * 7 % 256) as u16).to_le_bytes()).collect();
    std::fs::create_dir_all(case.path("d/more")).expect("a folder");
    for name in ["d/train.bin", "d/val.bin", "d/more/train.bin"] {
        case.write(name, &tokens);
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(".", case.path("d/more/again")).expect("a link");
    let twice = ["data.source=['d', 'd/train.bin']", "data.files='*.bin'", "data.validation.files=[]"];
    refuses(&mut case.pretrain(&twice), &folder, 2, &["data.source", "d/train.bin", "twice"]);
    let same = ["data.source='d/train.bin'", "data.validation.source='d/train.bin'", "data.validation.files=[]"];
    let output = run(&mut case.pretrain(&same));
    assert!(output.status.success() && stderr(&output).contains("of the training data itself"), "{}", stderr(&output));
    std::fs::remove_dir_all(case.run_folder()).expect("the run");
    // A folder with a link to itself, whose validation file is left out.
    let settings =
        ["data.source='d'", "data.files='*.bin'", "data.validation.source='d'", "data.validation.files='val.bin'"];
    let output = run(&mut case.pretrain(&settings));
    let text = stderr(&output).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(output.status.success() && text.contains("data 2 files, 12.0k tokens"), "{text}");
}

#[test]
fn keys_that_would_do_nothing_are_refused() {
    let case = Case::new();
    let folder = case.run_folder();
    // Without validation data: small_config has some.
    let bare = |settings: &[&str]| {
        let text = std::fs::read_to_string(small_config(case.folder.path(), 4, 2)).expect("the config");
        let line = |line: &&str| !line.starts_with("validation") && !line.starts_with("eval_every");
        let text: String = text.lines().filter(line).map(|line| format!("{line}\n")).collect();
        let mut command = vrtrain();
        command.args(["pretrain", "--config"]).arg(case.write("bare.toml", text.as_bytes()));
        command.arg("--run-dir").arg(&folder);
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        command
    };
    refuses(&mut bare(&["train.eval_every=2"]), &folder, 2, &["train.eval_every", "data.validation"]);
    refuses(&mut bare(&["data.text_column=body"]), &folder, 2, &["data.text_column", "tokens.bin has no columns"]);
    refuses(&mut bare(&["train.sample_prompt=Once"]), &folder, 2, &["train.sample_prompt", "train.sample_every"]);
    let files = ["data.files='*.bin'"];
    refuses(&mut bare(&files), &folder, 2, &["data.files", "tokens.bin is a file"]);
    refuses(
        &mut case.pretrain(&["data.validation.files='*.bin'"]),
        &folder,
        2,
        &["data.validation.files", "is a file"],
    );
    let mut quickstart = vrtrain();
    quickstart.args(["pretrain", "--set", "data.files=*.txt", "--run-dir"]).arg(&folder);
    refuses(&mut quickstart, &folder, 2, &["data.files", "quickstart"]);
    // What switches something off, and the default column of a resolved config, are no such keys; and a file that the
    // command line names stands in place of the config's choice.
    let text = std::fs::read_to_string(case.path("bare.toml")).expect("the config");
    case.write("bare.toml", text.replace("shuffle = true", "files = 'a/*.bin'\nshuffle = true").as_bytes());
    let tokens = format!("data.source='{}'", fixture("train/vradam-accumulated/tokens.bin").display());
    let settings =
        [&tokens, "train.eval_every=0", "train.sample_every=0", "train.sample_prompt=Once", "data.text_column=text"];
    let mut command = vrtrain();
    command.args(["pretrain", "--config"]).arg(case.path("bare.toml")).arg("--run-dir").arg(&folder);
    settings.iter().for_each(|setting| {
        command.args(["--set", setting]);
    });
    succeed(&mut command);
    succeed(vrtrain().args(["pretrain", "--resume", "--set", "train.steps=5", "--run-dir"]).arg(&folder));
}

#[test]
fn a_line_of_metrics_torn_by_a_full_disk_does_not_end_the_run() {
    let case = Case::new();
    let output = run(&mut case.pretrain(&["train.checkpoint_every=2", "train.steps=4"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let metrics = case.path("run/metrics.jsonl");
    let whole = std::fs::read_to_string(&metrics).expect("metrics");
    for (text, warns) in [(format!("{whole}{{\"step\":5,\"tok"), false), (String::new(), true)] {
        std::fs::write(&metrics, text).expect("metrics");
        let steps = if warns { "train.steps=8" } else { "train.steps=6" };
        let output = run(case.pretrain(&[steps]).arg("--resume"));
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output).contains("nothing is left of steps"), warns, "{}", stderr(&output));
    }
    assert_eq!(std::fs::read_to_string(&metrics).expect("metrics").lines().count(), 2);
}

#[test]
fn sizes_beyond_every_machine_are_refused_in_words() {
    let case = Case::new();
    let folder = case.run_folder();
    refuses(&mut case.pretrain(&["model.n_layer=99999999999"]), &folder, 2, &["model.n_layer", "too large"]);
    refuses(&mut case.pretrain(&["model.n_embd=1000000000", "model.n_head=1"]), &folder, 2, &["parameters"]);
    for (flags, code, words) in [
        (vec!["--vocab-size", "18446744073709551615"], 2, "model.vocab_size"),
        (vec!["--n-layer", "99999999999"], 2, "model.n_layer"),
        (vec!["--n-embd", "1000000000000", "--n-head", "1"], 2, "model.n_embd"),
        (vec!["--micro-batch", "4294967295"], 2, "tokens a step"),
        (vec!["--n-embd", "100000", "--n-head", "1"], 1, "and the machine has"),
    ] {
        let output = run(vrtrain().args(["bench", "train"]).args(&flags));
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{flags:?}: {}", stderr(&output));
    }
}

#[test]
fn a_state_that_overflows_is_never_saved_and_the_checkpoint_before_it_stands() {
    let case = Case::new();
    // The rate climbs from 3e-3 to 3e38 over two steps: the second spoils the weights after a loss that was still finite.
    let output = run(&mut case.pretrain(&[
        "optimizer.lr=3e38",
        "optimizer.weight_decay=100",
        "schedule.name=range_test",
        "schedule.min_lr_ratio=1e-41",
        "schedule.warmup_steps=0",
        "train.checkpoint_every=1",
        "train.keep_last=1",
        "train.steps=2",
    ]));
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("no checkpoint of"), "{text}");
    let latest = std::fs::read_to_string(case.run_folder().join("latest")).expect("a checkpoint before");
    let generated = run(vrtrain().arg("generate").arg(case.run_folder()).args(["--prompt-ids", "1"]));
    assert!(generated.status.success(), "{latest}: {}", stderr(&generated));
    // A second moment that overflows while weights and loss are finite.
    let moments = Case::new();
    let settings = ["optimizer.beta3=0", "optimizer.lr=1e3", "train.grad_clip=0", "train.steps=30"];
    let output = run(moments.pretrain(&settings).args(["--set", "train.checkpoint_every=0"]));
    let resumed = run(moments.pretrain(&settings).args(["--set", "train.steps=31", "--resume"]));
    let agree = output.status.code() == Some(1) || resumed.status.code() != Some(1);
    assert!(agree, "{} {}", stderr(&output), stderr(&resumed));
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it() {
    let case = Case::new();
    let output =
        run(&mut case.pretrain(&["optimizer.lr=1e30", "train.grad_clip=0", "train.steps=50", "optimizer.beta3=0"]));
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("micro-batch") || text.contains("not finite"), "{text}");
    for step in std::fs::read_dir(case.run_folder().join("checkpoints")).into_iter().flatten().flatten() {
        let output = run(vrtrain().arg("generate").arg(step.path()).args(["--prompt-ids", "1"]));
        assert!(output.status.success(), "a poisoned checkpoint was written: {}", stderr(&output));
    }
}
