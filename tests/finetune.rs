//! `vrtrain finetune`: losses against transformers, packing against padding, resume, the best checkpoint, bad input.

mod common;

use common::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A run on stories260K and the fixtures' GSM8K problems, of which those that fit 512 positions are used.
fn config(folder: &Path, settings: &str) -> PathBuf {
    let gsm8k = fixture("finetune/gsm8k.jsonl");
    let text = format!(
        r#"
seed = 3
model.init = "{}"
[data]
source = "{gsm8k}"
format = "completion"
prompt_column = "question"
completion_column = "answer"
template = "Question: {{prompt}}\nAnswer: {{completion}}"
too_long = "drop"
validation = {{ source = "{gsm8k}" }}
[optimizer]
name = "vradam"
lr = 0.003
[schedule]
name = "constant"
[train]
sequence_length = 512
micro_batch = 2
tokens_per_step = 2048
dtype = "f32"
device = "cpu"
{settings}
"#,
        fixture("stories260K").display(),
        gsm8k = gsm8k.display()
    );
    let path = folder.join("tune.toml");
    std::fs::write(&path, text).expect("a config can be written");
    path
}

fn finetune(config: &Path, run: &Path) -> Command {
    let mut command = vrtrain();
    command.args(["finetune", "--config"]).arg(config).arg("--run-dir").arg(run);
    command
}

fn json(command: &mut Command) -> Value {
    serde_json::from_str(stdout(&succeed(command.arg("--json"))).trim()).expect("one object")
}

fn expected(key: &str) -> f64 {
    let text = std::fs::read_to_string(fixture("finetune/expected.json")).expect("the fixture");
    number(&serde_json::from_str(&text).expect("JSON"), key)
}

/// Records without what time decides.
fn timeless(run: &Path) -> Vec<Value> {
    let mut records = metrics(run);
    for record in &mut records {
        let record = record.as_object_mut().expect("a record is an object");
        record.remove("step_ms");
        record.remove("tokens_per_s");
    }
    records
}

#[test]
fn the_first_loss_is_transformers_whether_packed_or_padded_and_training_lowers_it() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = config(folder.path(), "epochs = 4\neval_every = 3");
    let mut first = Vec::new();
    for packing in ["true", "false"] {
        let run = folder.path().join(format!("run-{packing}"));
        let mut command = finetune(&config, &run);
        command.args(["--set", &format!("data.packing={packing}")]);
        let output = succeed(command.arg("--json"));
        let summary: Value = serde_json::from_str(stdout(&output).trim()).expect("one object");
        let loss = number(&summary, "first_val_loss");
        assert!((loss - expected("stories_gsm8k_loss")).abs() < 2e-5, "{packing}: {loss}");
        assert!(number(&summary, "val_loss") < loss - 0.5, "{summary}");
        assert!(stderr(&output).contains("1 left out: longer than a row"), "{}", stderr(&output));
        assert!(
            stderr(&output).contains(&format!("before the first step: validation loss {loss:.4}")),
            "{}",
            stderr(&output)
        );
        let records = metrics(&run);
        // 7 problems of 263 + 171 + 399 + 157 + 485 + 436 + 320 tokens, the last of each no input.
        let epoch = 2231.0 - 7.0;
        let seen = number(&records[records.len() - 1], "tokens");
        assert!((seen / epoch - 4.0).abs() < 0.8, "{packing}: {seen} tokens");
        first.push(loss);
    }
    assert!((first[0] - first[1]).abs() < 2e-6, "{first:?}");
}

#[test]
fn a_conversations_first_loss_is_transformers() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = config(folder.path(), "steps = 1");
    // The fixture's own template stands beside the tokenizer, as a model's does.
    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("stories260K").join(name), model.join(name)).expect("a copy");
    }
    let text = std::fs::read_to_string(fixture("finetune/expected.json")).expect("the fixture");
    let values: Value = serde_json::from_str(&text).expect("JSON");
    let template = values["chat_template"].as_str().expect("a template");
    std::fs::write(model.join("chat_template.jinja"), template).expect("a file");
    let text = std::fs::read_to_string(&config).expect("the config");
    let kept =
        |line: &&str| !["prompt_column", "completion_column", "template"].iter().any(|key| line.starts_with(key));
    let text: Vec<&str> = text.lines().filter(kept).collect();
    let text = text.join("\n").replace("\"completion\"", "\"chat\"").replace("gsm8k.jsonl", "oasst.jsonl");
    let text = text.replace(&fixture("stories260K").display().to_string(), &model.display().to_string());
    std::fs::write(&config, text).expect("a config");
    let summary = json(&mut finetune(&config, &folder.path().join("run")));
    let loss = number(&summary, "first_val_loss");
    assert!((loss - expected("stories_oasst_loss")).abs() < 2e-5, "{loss}");
    assert!(folder.path().join("run/model/chat_template.jinja").is_file());
}

/// A config of conversations on a model whose chat template begins with `head`.
fn chat_config(folder: &Path, head: &str) -> PathBuf {
    let config = config(folder, "steps = 2\ncheckpoint_every = 1");
    let model = folder.join("model");
    std::fs::create_dir(&model).expect("a folder");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("stories260K").join(name), model.join(name)).expect("a copy");
    }
    let turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n\
                 {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    std::fs::write(model.join("chat_template.jinja"), format!("{head}{turns}")).expect("a template");
    let text = std::fs::read_to_string(&config).expect("the config");
    let kept =
        |line: &&str| !["prompt_column", "completion_column", "template"].iter().any(|key| line.starts_with(key));
    let text: Vec<&str> = text.lines().filter(kept).collect();
    let text = text.join("\n").replace("\"completion\"", "\"chat\"").replace("gsm8k.jsonl", "oasst.jsonl");
    std::fs::write(&config, text.replace(&fixture("stories260K").display().to_string(), &model.display().to_string()))
        .expect("a config");
    config
}

#[test]
fn a_run_keeps_the_day_that_its_chat_template_writes() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = chat_config(folder.path(), "{{ strftime_now('%d %b %Y') }}\n");
    let today = folder.path().join("today");
    succeed(finetune(&config, &today).args(["--quiet", "--set", "train.steps=1"]));
    let stored = std::fs::read_to_string(today.join("config.toml")).expect("a config");
    assert!(stored.contains("date = \"20"), "{stored}");
    // A run of another day goes on with its own day, by its own config and by the one that it was begun with.
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    let day = ["--quiet", "--set", "data.date=2024-02-29", "--set"];
    succeed(finetune(&config, &whole).args(day).arg("train.steps=3"));
    succeed(finetune(&config, &parts).args(day).arg("train.steps=1"));
    let more = ["--resume", "--quiet", "--set", "train.steps=2", "--run-dir"];
    succeed(vrtrain().arg("finetune").args(more).arg(&parts));
    succeed(finetune(&config, &parts).args(["--resume", "--quiet", "--set", "train.steps=3"]));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint_file(&whole, file) == checkpoint_file(&parts, file), "{file} differs");
    }
    let losses = |run: &Path| metrics(run).iter().map(|record| number(record, "loss")).collect::<Vec<_>>();
    assert_ne!(losses(&whole)[0], losses(&today)[0], "the day is in the text");
    let other = run(finetune(&config, &parts).args(["--resume", "--set", "data.date=2024-03-01"]));
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("data.date"), "{}", stderr(&other));

    let timeless = tempfile::tempdir().expect("a scratch folder");
    let config = chat_config(timeless.path(), "");
    let refused = run(finetune(&config, &timeless.path().join("run")).args(["--set", "data.date=2024-02-29"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("the chat template writes no date"), "{}", stderr(&refused));
}

#[test]
fn a_run_that_was_killed_and_resumed_ends_with_the_bits_of_one_that_never_stopped() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = config(folder.path(), "steps = 12\neval_every = 4\ncheckpoint_every = 1\nkeep_last = 2");
    let whole = folder.path().join("whole");
    succeed(finetune(&config, &whole).arg("--quiet"));
    let killed = folder.path().join("killed");
    let mut kills = 0;
    for stop_at in [2, 5, 6, 9] {
        let mut command = finetune(&config, &killed);
        command.arg("--quiet").stdout(Stdio::null()).stderr(Stdio::null());
        if killed.exists() {
            command.arg("--resume");
        }
        let mut child = command.spawn().expect("the binary starts");
        let done =
            || std::fs::read_to_string(killed.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() >= stop_at);
        while !done() && child.try_wait().expect("the child can be asked").is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        kills += usize::from(child.try_wait().expect("the child can be asked").is_none());
        let _ = child.kill();
        child.wait().expect("the child ends");
    }
    assert!(kills > 0, "the run was too fast to be killed");
    succeed(finetune(&config, &killed).args(["--quiet", "--resume"]));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint_file(&whole, file) == checkpoint_file(&killed, file), "{file} differs");
    }
    assert_eq!(timeless(&whole), timeless(&killed));
    let best = |run: &Path| std::fs::read_to_string(run.join("best")).expect("a best checkpoint");
    assert_eq!(best(&whole), best(&killed));
    // The stored config alone goes on too, and other data are refused.
    let more = ["--resume", "--quiet", "--set", "train.steps=13", "--run-dir"];
    succeed(vrtrain().arg("finetune").args(more).arg(&killed));
    let mut other = vrtrain();
    other.args(["finetune", "--resume", "--set", "data.packing=false", "--run-dir"]).arg(&killed);
    let output = run(&mut other);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("data.packing"), "{}", stderr(&output));
}

#[test]
fn the_best_checkpoint_is_kept_named_and_exported() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("run");
    // A rate so large that the loss falls at first and rises later.
    let config = config(folder.path(), "steps = 10\neval_every = 1\ncheckpoint_every = 5\nkeep_last = 1");
    succeed(finetune(&config, &path).args(["--quiet", "--set", "optimizer.lr=0.05"]));
    let losses: Vec<f64> = metrics(&path).iter().map(|record| number(record, "val_loss")).collect();
    let lowest = (0..losses.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).expect("losses") + 1;
    assert!(lowest < 10, "the last step is the best: {losses:?}");
    let best = std::fs::read_to_string(path.join("best")).expect("a best checkpoint");
    assert_eq!(best.trim(), format!("step-{lowest:08}"));
    let kept: Vec<String> = std::fs::read_dir(path.join("checkpoints"))
        .expect("checkpoints")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(kept.len(), 2, "the best one and the newest: {kept:?}");

    let (newest, best) = (folder.path().join("newest"), folder.path().join("best"));
    succeed(vrtrain().arg("export").arg(&path).arg("--out").arg(&newest));
    succeed(vrtrain().arg("export").arg(&path).args(["--best", "--out"]).arg(&best));
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).expect("weights");
    assert!(weights(&newest) != weights(&best));
    let again = folder.path().join("again");
    succeed(vrtrain().arg("export").arg(path.join("best")).arg("--out").arg(&again));
    assert!(weights(&best) == weights(&again));
    assert!(!path.join("checkpoints").join("step-00000005").exists() || lowest == 5);
}

#[test]
fn a_run_is_fine_tuned_from_and_held_out_problems_are_answered() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let first = folder.path().join("first");
    let config = config(folder.path(), "steps = 2");
    succeed(finetune(&config, &first).arg("--quiet"));
    let second = folder.path().join("second");
    let mut command = finetune(&config, &second);
    command.args(["--set", "train.eval_exact_match=3", "--set", "train.exact_match_tokens=10"]);
    command.arg("--set").arg(format!("model.init='{}'", first.display()));
    let summary = json(&mut command);
    let ended = number(&metrics(&first)[1], "val_loss");
    assert!((number(&summary, "first_val_loss") - ended).abs() < 1e-9, "the second run begins where the first ended");
    let right = number(&summary, "exact_match");
    assert!((0.0..=1.0).contains(&right));
    assert_eq!(number(&metrics(&second)[1], "exact_match"), right);
    assert!(metrics(&second)[0].get("exact_match").is_none(), "only where it was taken");
}

#[test]
fn bad_examples_and_settings_are_refused_with_what_to_do() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("run");
    let config = config(folder.path(), "steps = 1");
    let write = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).expect("a file");
        format!("data.source='{}'", folder.path().join(name).display())
    };
    let refuses = |settings: &[&str], code: i32, words: &[&str]| {
        let mut command = finetune(&config, &path);
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        let output = run(&mut command);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{settings:?}: {text}");
        words.iter().for_each(|word| assert!(text.contains(word), "{settings:?}: no {word:?} in {text}"));
        assert!(!text.contains("panicked") && !path.exists(), "{settings:?}: {text}");
    };
    refuses(&["data.prompt_column=problem"], 1, &["no column `problem`", "question, answer", "gsm8k.jsonl"]);
    refuses(
        &["data.template='{question} {completion}'"],
        2,
        &["data.template", "{question} is not a place", "{prompt}"],
    );
    refuses(&["data.template='{prompt}'"], 2, &["data.template", "{completion}"]);
    refuses(&["data.format=completions"], 2, &["data.format", "did you mean \"completion\""]);
    refuses(&["data.too_long=cut"], 2, &["data.too_long", "\"truncate\""]);
    refuses(&["data.too_long=error"], 1, &["has 541 tokens", "data.too_long", "sequence_length"]);
    refuses(&["data.text_column=text"], 2, &["data.text_column", "has no meaning"]);
    refuses(&["data.messages_column=m"], 2, &["data.messages_column", "has no meaning"]);
    refuses(
        &["train.sequence_length=32", "train.tokens_per_step=64"],
        1,
        &["no example", "8 left out: longer than a row"],
    );
    refuses(&["data.validation.examples=0"], 2, &["data.validation.examples", "at least 1"]);
    let empty = write("empty.jsonl", "\n\n");
    refuses(&[&empty], 1, &["no example"]);
    let broken = write("broken.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": \n");
    refuses(&[&broken], 1, &["line 2", "broken.jsonl", "not JSON"]);
    let text = write("plain.txt", "hello");
    refuses(&[&text], 1, &["plain.txt has no columns", "jsonl and parquet"]);
    let torn = write("torn.parquet", "PAR1 and then nothing that a parquet file has PAR1");
    refuses(&[&torn], 1, &["torn.parquet"]);
    let gold = write("gold.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n");
    let gold = gold.replace("data.source", "data.validation.source");
    refuses(&[&gold, "train.eval_exact_match=1"], 2, &["train.eval_exact_match", "#### NUMBER"]);
    refuses(&["train.eval_exact_match=8"], 2, &["train.eval_exact_match", "there are 7 held-out examples"]);
    let output = run(vrtrain().args(["pretrain", "--config"]).arg(&config).arg("--run-dir").arg(&path));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("vrtrain finetune"), "{}", stderr(&output));

    let pretraining = small_config(folder.path(), 2, 1);
    let output = run(&mut finetune(&pretraining, &path));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("model.init"), "{}", stderr(&output));
}

#[test]
fn every_config_of_fine_tuning_is_complete_and_closed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut found = 0;
    // The laboratory's configs lie in a folder of their own.
    let entries = std::fs::read_dir(folder).expect("configs").flatten();
    for entry in entries.filter(|entry| entry.path().is_file()) {
        let text = std::fs::read_to_string(entry.path()).expect("a config");
        if text.contains("format = \"completion\"") || text.contains("format = \"chat\"") {
            // The quickstart's command chooses what it starts from.
            let init = text.contains("source = \"quickstart\"").then(|| "model.init=a/b".to_owned());
            let config = vrtrain::config::RunConfig::load(&entry.path(), &Vec::from_iter(init));
            let config = config.expect("a config that resolves");
            assert!(config.data.examples.is_some());
            found += 1;
        }
    }
    assert!(found >= 4, "{found}");
}

#[test]
fn the_quickstart_fine_tunes_the_newest_finished_pre_training_run() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let shorter = ["--set", "train.micro_batch=2", "--set", "train.tokens_per_step=256"];
    let mut pretrain = vrtrain();
    pretrain.current_dir(folder.path()).args(["pretrain", "--quiet", "--set", "train.steps=2"]).args(shorter);
    succeed(&mut pretrain);
    let mut command = vrtrain();
    command.current_dir(folder.path()).args(["finetune", "--json", "--set", "train.steps=2"]).args(shorter);
    command.args(["--set", "train.eval_exact_match=2"]);
    let output = succeed(&mut command);
    let summary: Value = serde_json::from_str(stdout(&output).trim()).expect("one object");
    for key in ["exact_match_before", "exact_match", "first_val_loss", "val_loss"] {
        assert!(summary[key].is_number(), "{key} in {summary}");
    }
    assert!(stderr(&output).contains("runs/quickstart-1"), "{}", stderr(&output));
    let run = folder.path().join("runs/quickstart-finetune-1");
    let resolved = std::fs::read_to_string(run.join("config.toml")).expect("a config");
    assert!(resolved.contains("quickstart-1"), "the stored config says what was fine-tuned: {resolved}");
    succeed(vrtrain().args(["finetune", "--quiet", "--resume", "--set", "train.steps=3", "--run-dir"]).arg(&run));
    assert_eq!(metrics(&run).len(), 3);
}
