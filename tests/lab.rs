//! The laboratory from outside: studies, small tasks, comparisons, searches and sharpness, as a user runs them.

mod common;

use common::{fixture, metrics, number, run, stderr, stdout, succeed, vrtrain};
use serde_json::Value;
use std::path::Path;

fn json(output: &std::process::Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap_or_else(|error| panic!("{error}: {}", stdout(output)))
}

/// A small grid, seconds long.
fn grid(folder: &Path) -> String {
    let text = r#"
seed = 3
[task]
name = "gridworld"
batch = 16
side = 4
layers = 1
width = 16
[optimizer]
name = "vradam"
lr = 3e-3
[schedule]
name = "constant"
[train]
steps = 60
eval_every = 10
checkpoint_every = 20
"#;
    let path = folder.join("grid.toml");
    std::fs::write(&path, text).expect("a config can be written");
    path.to_string_lossy().into_owned()
}

#[test]
fn the_stability_study_reports_the_known_numbers() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("pictures");
    let output = succeed(vrtrain().args(["lab", "stability", "--json", "--out"]).arg(&out));
    let study = json(&output);
    assert!((number(&study, "threshold") - 38.0).abs() < 1e-9);
    assert!((number(&study, "threshold_measured") - 38.0).abs() < 1e-6);
    assert!((study["alternating"]["growth_in_turn"].as_f64().expect("a number") - 2.0).abs() < 0.005);
    let fate = |part: f64| {
        let rows = study["quadratic"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["alpha0_l_over_b"] == part).expect("the row");
        (row["gated"][0]["fate"].as_str().expect("a word").to_owned(), row["gated"][0]["amplitude"].as_f64())
    };
    assert_eq!(fate(10.9).0, "bounded");
    assert_eq!(fate(11.2).0, "diverges");
    assert!(fate(0.5).1.is_some_and(|amplitude| (amplitude - 1.4).abs() < 0.05));
    assert!(out.join("closed-loop.png").is_file() && out.join("alternating.svg").is_file());
    let refused = run(vrtrain().args(["lab", "stability", "--beta1", "1.5"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--beta1"), "{}", stderr(&refused));
}

#[test]
fn a_small_task_resumed_ends_in_the_same_bits_and_measures_its_sharpness() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = grid(folder.path());
    let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(name));
    let track = ["--set", "task.sharpness_every=30", "--set", "task.sharpness_examples=16"];
    let start = |run_dir: &Path| {
        let mut command = vrtrain();
        command.args(["lab", "train", "--quiet", "--config", &config]).args(track).arg("--run-dir").arg(run_dir);
        command
    };
    succeed(&mut start(&whole));
    succeed(start(&cut).args(["--set", "train.steps=40", "--set", "schedule.steps=60"]));
    succeed(start(&cut).args(["--resume", "--set", "train.steps=60", "--set", "schedule.steps=60"]));
    let weights = |run: &Path| common::checkpoint_file(run, "model.safetensors");
    assert!(weights(&whole) == weights(&cut), "other bits after a resume");
    let (a, b) = (metrics(&whole), metrics(&cut));
    assert_eq!(a.len(), 60);
    for (a, b) in a.iter().zip(&b) {
        for key in ["loss", "eta", "val_loss", "val_distance", "batch"] {
            assert_eq!(a[key], b[key], "{key} of step {}", a["step"]);
        }
    }
    assert!(number(&a[59], "val_loss") < number(&a[9], "val_loss"));
    let lines = std::fs::read_to_string(whole.join("sharpness.jsonl")).expect("measurements");
    assert_eq!(lines, std::fs::read_to_string(cut.join("sharpness.jsonl")).expect("measurements"));
    assert_eq!(lines.lines().count(), 2);
    let last: Value = serde_json::from_str(lines.lines().last().expect("a line")).expect("JSON");
    assert!(last["sharpness"][0].as_f64() > Some(0.0) && last["preconditioned"][0].as_f64() > Some(0.0));
    assert!(whole.join("sharpness.png").is_file());
    // The checkpoint's sharpness is the one that was measured there.
    let output = succeed(vrtrain().args(["sharpness", "--json", "--examples", "16", "--iterations", "20"]).arg(&whole));
    let measured = json(&output)["measurements"][0].clone();
    assert_eq!(measured["sharpness"][0], last["sharpness"][0]);
    // As a process leaves it that dies when the last checkpoint is there and `latest` not yet turned to it.
    std::fs::write(cut.join("latest"), "step-00000040\n").expect("a pointer that is one checkpoint old");
    let output = succeed(start(&cut).args(["--resume", "--set", "train.steps=60", "--set", "schedule.steps=60"]));
    assert!(stderr(&output).contains("finished"), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(cut.join("latest")).expect("latest"), "step-00000060\n");
    let other = run(start(&cut).args(["--resume", "--set", "optimizer.lr=0.1"]));
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("optimizer.lr"), "{}", stderr(&other));
}

#[test]
fn sharpness_along_a_run_carries_its_doubts_and_more_examples_than_there_are_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = grid(folder.path());
    let train = |name: &str, settings: &[&str]| {
        let mut command = vrtrain();
        command.args(["lab", "train", "--quiet", "--set", "train.steps=2", "--set", "task.sharpness_every=2"]);
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        command.args(["--config", &config, "--run-dir"]).arg(folder.path().join(name));
        run(&mut command)
    };
    let doubts = |name: &str| {
        let lines = std::fs::read_to_string(folder.path().join(name).join("sharpness.jsonl")).expect("measurements");
        serde_json::from_str::<Value>(lines.trim()).expect("one measurement")["doubts"].clone()
    };
    let sure = train("sure", &[]);
    assert!(sure.status.success() && stderr(&sure).is_empty(), "{}", stderr(&sure));
    assert_eq!(doubts("sure"), Value::Null);
    // One iteration finds a mean of the eigenvalues.
    let unsure = train("unsure", &["task.sharpness_iterations=1"]);
    let found = doubts("unsure");
    let told: Vec<&str> =
        found.as_array().expect("doubts").iter().map(|doubt| doubt.as_str().expect("words")).collect();
    assert!(told.len() == 2 && told[0].contains("H have not been found to the end"), "{told:?}");
    for doubt in told {
        assert!(stderr(&unsure).contains(&format!("warning: step 2: {doubt}")), "{}", stderr(&unsure));
    }

    let refused = train("refused", &["task.sharpness_examples=10000001"]);
    assert_eq!(refused.status.code(), Some(2));
    for word in ["--set task.sharpness_examples=10000001", "only 10000000 walks"] {
        assert!(stderr(&refused).contains(word), "{}", stderr(&refused));
    }
    // CIFAR-10's records: a label and 3,072 bytes of colour; 20 of them.
    let path = folder.path().join("images.bin");
    let record = |label: u8| std::iter::once(label).chain((0..3072).map(move |i| (i * 7 % 251) as u8 ^ label));
    std::fs::write(&path, (0..20).flat_map(|image| record(image % 10)).collect::<Vec<u8>>()).expect("images");
    let text = "[task]\nname = \"cifar10-cnn\"\nbatch = 4\nsharpness_every = 1\nsharpness_examples = 21\n[data]\n\
                source = \"images.bin\"\nvalidation = { source = \"images.bin\" }\n[optimizer]\nname = \"adamw\"\n\
                [train]\nsteps = 1\n";
    std::fs::write(folder.path().join("images.toml"), text).expect("a config");
    let mut command = vrtrain();
    command.current_dir(folder.path()).args(["lab", "train", "--config", "images.toml", "--run-dir", "images"]);
    let refused = run(&mut command);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("21 are asked for, but only 20 images"), "{}", stderr(&refused));
    assert!(!folder.path().join("images").exists());
    // The default number of them is no such wish.
    let few = text.replace("sharpness_examples = 21", "sharpness_iterations = 1");
    std::fs::write(folder.path().join("images.toml"), few).expect("a config");
    assert!(run(&mut command).status.success());
    let resolved = std::fs::read_to_string(folder.path().join("images/config.toml")).expect("the run's config");
    assert!(resolved.contains("sharpness_examples = 20"), "{resolved}");
}

#[test]
fn a_comparison_pairs_its_runs_and_goes_on_where_it_was_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("out"));
    let compare = |more: &[&str]| {
        let mut command = vrtrain();
        command.args(["compare", "--config", &config, "--optimizers", "vradam,adamw,sgd", "--json", "--out"]);
        command.arg(&out).args(["--set", "optimizer.lr=2e-3", "--set-for", "sgd:optimizer.lr=1e-3"]).args(more);
        command
    };
    let results = json(&succeed(&mut compare(&["--seeds", "1,2"])));
    assert_eq!(results["paired"], true);
    assert_eq!(results["baseline"], "adamw");
    let rows = results["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 3);
    for row in rows {
        assert_eq!(row["finished"], 2);
        assert!(row["val_loss"]["half_width_95"].as_f64() > Some(0.0), "{row}");
    }
    assert!(rows[0]["difference"]["mean"].is_number() && rows[1]["difference"].is_null());
    assert_eq!(rows[1]["time_against_adamw"], 1.0);
    // What the command line sets holds for every optimizer, what it sets for one comes after it.
    for (name, lr) in [("vradam", 2e-3), ("adamw", 2e-3), ("sgd", 1e-3)] {
        let path = out.join("runs").join(format!("{name}-seed-1")).join("config.toml");
        let config: toml::Table = std::fs::read_to_string(path).expect("a config").parse().expect("TOML");
        assert_eq!(config["optimizer"]["lr"].as_float(), Some(lr), "{name}");
    }
    let hash = |name: &str| std::fs::read(out.join("runs").join(name).join("initial.sha256")).expect("a hash");
    assert_eq!(hash("vradam-seed-1"), hash("sgd-seed-1"));
    assert_ne!(hash("vradam-seed-1"), hash("vradam-seed-2"));
    for file in ["results.json", "table.md", "curves.png", "differences.svg"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    // One run is lost; a third seed joins. The others are not made again.
    let kept =
        std::fs::metadata(out.join("runs/adamw-seed-1/metrics.jsonl")).expect("metrics").modified().expect("a time");
    std::fs::remove_file(out.join("runs/sgd-seed-2.ended")).expect("a marker");
    std::fs::remove_dir_all(out.join("runs/sgd-seed-2")).expect("a run");
    let again = succeed(&mut compare(&["--seeds", "1,2,3", "--workers", "2"]));
    assert!(stderr(&again).contains("9 runs, 4 of them to be made"), "{}", stderr(&again));
    let now =
        std::fs::metadata(out.join("runs/adamw-seed-1/metrics.jsonl")).expect("metrics").modified().expect("a time");
    assert_eq!(kept, now);
    let seed_2 = |results: &Value| results["rows"][2]["runs"][1]["val_loss"].clone();
    assert_eq!(seed_2(&json(&again)), seed_2(&results));
    let changed = run(compare(&["--seeds", "1"]).args(["--set", "task.width=8"]));
    assert_eq!(changed.status.code(), Some(2), "{}", stderr(&changed));
    assert!(stderr(&changed).contains("another"), "{}", stderr(&changed));
}

#[test]
fn wrong_comparisons_are_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("out"));
    let blind = common::small_config(folder.path(), 4, 0);
    let lines = std::fs::read_to_string(&blind).expect("a config");
    let lines: Vec<&str> =
        lines.lines().filter(|line| !line.starts_with("validation") && !line.starts_with("eval_every")).collect();
    std::fs::write(&blind, lines.join("\n")).expect("a config");
    let blind = blind.display().to_string();
    for (arguments, word) in [
        (vec!["--config", &config, "--optimizers", "vradam,adamww"], "adamww"),
        (vec!["--config", &config, "--optimizers", "vradam"], "two or more"),
        (vec!["--config", &config, "--optimizers", "vradam,vradam"], "given twice"),
        (vec!["--config", &config, "--optimizers", "vradam,sgd", "--baseline", "lion"], "lion"),
        (vec!["--config", &config, "--optimizers", "vradam,sgd", "--set-for", "sgd:optimizer.beta3=2"], "beta3"),
        (vec!["--config", &config, "--optimizers", "vradam,sgd", "--set", "optimizer.beta3=2"], "beta3"),
        (vec!["--config", &config, "--optimizers", "vradam,sgd", "--seeds", "1,1"], "given twice"),
        (vec!["--config", &config, "--optimizers", "vradam,sgd", "--seeds", "18446744073709551615"], "too large"),
        (vec!["--config", &config, "--optimizers", "vradam,sgd", "--set", "seed=77"], "seeds are given by --seeds"),
        (vec!["--config", &config, "--optimizers", "vradam,sgd", "--set-for", "sgd:seed=7"], "given by --seeds"),
        (vec!["--config", &config, "--optimizers", "adamw,sgd", "--set-for", "adamw:optimizer.name=sgd"], "another"),
        (vec!["--config", &config, "--optimizers", "adamw,sgd", "--set", "optimizer={name='sgd'}"], "--optimizers"),
        (vec!["--config", &config, "--optimizers", "adamw,sgd", "--set-for", "sgd:train.steps=9"], "train.steps is 9"),
        (vec!["--config", &config, "--optimizers", "adamw,sgd", "--set-for", "sgd:task.batch=9"], "task.batch is 9"),
        (vec!["--config", &config, "--optimizers", "adamw,sophiag"], "sophiag draws labels"),
        (vec!["--config", &blind, "--optimizers", "adamw,sgd"], "set data.validation.files"),
        (vec!["--config", &config, "--config", &config], "given twice"),
        (vec!["--task", "imagenet", "--optimizers", "vradam,sgd"], "gridworld"),
        (vec!["--optimizers", "vradam,sgd"], "--task"),
    ] {
        let output = run(vrtrain().arg("compare").args(&arguments).arg("--out").arg(&out));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{arguments:?}: {}", stderr(&output));
        assert!(!out.exists(), "{arguments:?}");
    }
}

#[test]
fn tuned_files_that_would_not_be_used_or_change_more_than_keys_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("out"));
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let good = file("good.toml", "[adamw]\n\"optimizer.lr\" = 0.01\n");
    let others = [
        (
            file("lion.toml", "[sgd]\n\"optimizer.lr\" = 0.01\n[lion]\n\"optimizer.lr\" = 0.01\n"),
            "[lion] is not compared",
        ),
        (file("empty.toml", "\n"), "holds nothing"),
        (file("bare.toml", "[adamw]\n"), "no section with keys"),
        (file("again.toml", "[adamw]\n\"optimizer.lr\" = 0.02\n"), "keys of adamw already"),
        (file("seed.toml", "[sgd]\n\"seed\" = 9\n"), "seeds are given by --seeds"),
        (file("name.toml", "[sgd]\n\"optimizer.name\" = \"lion\"\n"), "another optimizer.name"),
        (file("steps.toml", "[sgd]\n\"train.steps\" = 9\n"), "train.steps is 9"),
    ];
    for (other, word) in &others {
        let arguments =
            ["compare", "--config", &config, "--optimizers", "adamw,sgd", "--tuned", &good, "--tuned", other];
        let output = run(vrtrain().args(arguments).arg("--out").arg(&out));
        assert_eq!(output.status.code(), Some(2), "{word}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{word}: {}", stderr(&output));
    }
    let arguments = ["compare", "--config", &config, "--config", &others[0].0, "--tuned", &good];
    let output = run(vrtrain().args(arguments).arg("--out").arg(&out));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(!out.exists());
}

#[test]
fn whole_configs_keep_their_own_files_and_are_pairs_only_where_they_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = std::fs::read_to_string(grid(folder.path())).expect("a config");
    let out = folder.path().join("out");
    let mut command = vrtrain();
    command.args(["compare", "--seeds", "1", "--json", "--out"]).arg(&out);
    for (name, lr, steps) in [("lr-0.1", "1e-1", 20), ("lr-0.01", "1e-2", 20), ("long", "1e-2", 30)] {
        let path = folder.path().join(format!("{name}.toml"));
        let own = text.replace("lr = 3e-3", &format!("lr = {lr}")).replace("steps = 60", &format!("steps = {steps}"));
        std::fs::write(&path, own).expect("a config");
        command.arg("--config").arg(path);
    }
    let output = succeed(&mut command);
    let results = json(&output);
    for name in ["lr-0.1", "lr-0.01", "long"] {
        let run = out.join("runs").join(format!("{name}-seed-1"));
        assert_eq!(
            std::fs::read(run.with_file_name(format!("{name}-seed-1.ended"))).ok().as_deref(),
            Some(&b"finished"[..])
        );
        assert!(run.with_file_name(format!("{name}-seed-1.log")).is_file(), "{name}");
    }
    assert_ne!(results["rows"][0]["val_loss"], results["rows"][1]["val_loss"]);
    assert_eq!(results["paired"], false);
    let reasons = results["unpaired"].as_array().expect("reasons");
    assert_eq!(reasons, &["seed 1: lr-0.1 is trained for 20 steps and long for 30"]);
    assert!(stderr(&output).contains("trained for 20 steps"), "{}", stderr(&output));
}

#[test]
fn damaged_files_of_a_comparison_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("out"));
    let compare = || {
        let mut command = vrtrain();
        command.args(["compare", "--config", &config, "--optimizers", "adamw,sgd", "--seeds", "1", "--out"]).arg(&out);
        command
    };
    succeed(&mut compare());
    let metrics = std::fs::read_to_string(out.join("runs/sgd-seed-1/metrics.jsonl")).expect("metrics");
    let cut: String = metrics.split_inclusive('\n').take(50).collect();
    let gap: String = metrics.split_inclusive('\n').skip(1).collect();
    let blind = metrics.replace("\"val_loss\"", "\"loss_of_others\"");
    let plan = std::fs::read_to_string(out.join("comparison.json")).expect("a plan");
    for (file, damaged, word) in [
        ("runs/sgd-seed-1.ended", String::new(), "does not say how the run ended"),
        ("runs/sgd-seed-1.ended", "finis".into(), "to make the run again"),
        ("runs/sgd-seed-1/metrics.jsonl", cut, "it has 50 of 60 steps"),
        ("runs/sgd-seed-1/metrics.jsonl", gap, "steps are missing"),
        ("runs/sgd-seed-1/metrics.jsonl", blind, "no validation loss"),
        ("comparison.json", plan.replace("\"format\": 1", "\"format\": 9"), "its format is 9"),
    ] {
        let path = out.join(file);
        let whole = std::fs::read(&path).expect("a file");
        std::fs::write(&path, &damaged).expect("a file");
        let output = run(&mut compare());
        assert_eq!(output.status.code(), Some(1), "{file}: {}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains(word) && said.contains(path.to_str().expect("UTF-8")), "{file}: {said}");
        std::fs::write(&path, whole).expect("a file");
    }
    succeed(&mut compare());
}

#[test]
fn one_process_at_a_time_works_on_a_study_and_only_in_a_folder_of_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = grid(folder.path());
    let commands = [
        vec!["compare", "--config", &config, "--optimizers", "adamw,sgd", "--seeds", "1"],
        vec!["tune", "search", "--config", &config, "--optimizer", "adamw", "--trials", "1"],
    ];
    for arguments in commands {
        let out = folder.path().join(arguments[0]);
        let start = || run(vrtrain().args(&arguments).args(["--set", "train.steps=10", "--out"]).arg(&out));
        std::fs::create_dir(&out).expect("a folder");
        let lock = std::fs::File::create(out.join(".lock")).expect("a file");
        lock.try_lock().expect("a lock");
        let output = start();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let said = format!("{} is in use by another vrtrain", out.display());
        assert!(stderr(&output).contains(&said), "{}", stderr(&output));
        assert_eq!(std::fs::read_dir(&out).expect("a folder").count(), 1, "something was made");
        drop(lock);
        // The file alone, as a killed process leaves it, keeps nobody out.
        let output = start();
        assert!(output.status.success(), "{}", stderr(&output));
        std::fs::remove_file(out.join(if arguments[0] == "tune" { "study.jsonl" } else { "comparison.json" }))
            .expect("the head");
        let output = start();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("is not empty and holds no"), "{}", stderr(&output));
    }
}

#[test]
fn a_search_is_stored_resumed_and_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("study"));
    let search = |trials: &str, out: &Path| {
        let mut command = vrtrain();
        command.args(["tune", "search", "--config", &config, "--optimizer", "adamw", "--trials", trials, "--out"]);
        command.arg(out).args(["--range", "optimizer.lr=1e-4..3:log", "--json"]);
        command
    };
    succeed(&mut search("3", &out));
    let study = |out: &Path| std::fs::read_to_string(out.join("study.jsonl")).expect("a study");
    let three = study(&out);
    // A longer budget goes on with the same study.
    succeed(&mut search("5", &out));
    assert!(study(&out).starts_with(&three) && study(&out).lines().count() == 6);
    let fewer = succeed(&mut search("2", &out));
    assert!(stderr(&fewer).contains("has 5 trials already: --trials 2 makes no more"), "{}", stderr(&fewer));
    let other = run(search("5", &out).args(["--range", "optimizer.beta2=0.9..0.9999"]));
    assert_eq!(other.status.code(), Some(2), "{}", stderr(&other));
    assert!(stderr(&other).contains("another study: space was"), "{}", stderr(&other));
    // Killed after five trials, in the middle of a line.
    let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(name));
    let best = json(&succeed(&mut search("6", &whole)));
    std::fs::create_dir(&cut).expect("a folder");
    let lines: Vec<String> = study(&whole).lines().take(5).map(|line| format!("{line}\n")).collect();
    std::fs::write(cut.join("study.jsonl"), lines.concat() + "{\"trial\":4,").expect("a study");
    let output = succeed(&mut search("6", &cut));
    assert!(stderr(&output).contains("study.jsonl:6: torn by a kill"), "{}", stderr(&output));
    let resumed = json(&output);
    assert_eq!(resumed["objective"], best["objective"]);
    assert_eq!(study(&cut), study(&whole));
    assert!(number(&best, "objective") > 0.0 && best["values"]["optimizer.lr"].is_number());
    let compared = folder.path().join("compared");
    let arguments = ["compare", "--config", &config, "--optimizers", "adamw,sgd", "--seeds", "3", "--json", "--tuned"];
    let results = json(&succeed(vrtrain().args(arguments).arg(whole.join("best.toml")).arg("--out").arg(&compared)));
    // The same seed as the search's: the same run.
    assert_eq!(results["rows"][0]["runs"][0]["val_loss"], best["objective"]);
}

#[test]
fn bad_studies_are_refused_with_reasons() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("study"));
    for (range, word) in [
        ("optimizer.lr=1e-2..1:log", "leaves out the config's own optimizer.lr = 0.001"),
        ("optimizer.lr=1..1e-3:log", "empty"),
        ("optimizer.lr=0..1:log", "above 0"),
        ("optimizer.momentum=0..0.9", "momentum"),
        ("optimizer.beta1=0.5..1.5", "beta1"),
        ("train.stepz=1..5:integer", "train.stepz"),
        ("optimizer.lr", "KEY=LOW..HIGH"),
        ("seed=1..50:integer", "a seed is not a thing to tune"),
    ] {
        let arguments =
            ["tune", "search", "--config", &config, "--optimizer", "adamw", "--trials", "2", "--range", range];
        let output = run(vrtrain().args(arguments).arg("--out").arg(&out));
        assert_eq!(output.status.code(), Some(2), "{range}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{range}: {}", stderr(&output));
        assert!(!out.exists(), "{range}");
    }
    for (more, word) in [
        (vec!["--optimizer", "adamw", "--set", "optimizer.name=sgd"], "give one of the two"),
        (vec!["--optimizer", "sophiag"], "sophiag draws labels"),
    ] {
        let output = run(vrtrain().args(["tune", "search", "--config", &config]).args(&more).arg("--out").arg(&out));
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(word) && !out.exists(), "{more:?}: {}", stderr(&output));
    }
    // A rate at which everything diverges: a study of failures alone is an error, not a result.
    let arguments = ["tune", "search", "--config", &config, "--trials", "5", "--optimizer", "sgd"];
    let ranges = ["--set", "optimizer.lr=1e30", "--range", "optimizer.lr=1e20..1e35:log"];
    let output = run(vrtrain().args(arguments).args(ranges).arg("--out").arg(&out));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("none of the first"), "{}", stderr(&output));
}

#[test]
fn the_range_test_and_the_gate_recommend_numbers() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = grid(folder.path());
    let out = folder.path().join("range");
    let arguments =
        ["tune", "lr", "--config", &config, "--optimizer", "adamw", "--json", "--from", "1e-5", "--steps", "120"];
    let range = json(&succeed(vrtrain().args(arguments).arg("--out").arg(&out)));
    let steepest = number(&range, "steepest");
    assert!((1e-5..1.0).contains(&steepest) && number(&range, "least") >= steepest, "{range}");
    assert!(out.join("range.png").is_file());
    let rates: Vec<f64> = metrics(&out.join("run")).iter().map(|record| number(record, "lr")).collect();
    assert!((rates[0] / 1e-5 - 1.0).abs() < 1e-9 && (rates[119] - 1.0).abs() < 1e-9, "{rates:?}");
    let out = folder.path().join("gate");
    let gate = json(&succeed(vrtrain().args(["tune", "gate", "--config", &config, "--json", "--out"]).arg(&out)));
    let squares: Vec<f64> = metrics(&out.join("run")).iter().map(|record| number(record, "velocity_sq")).collect();
    let below = squares.iter().filter(|square| **square * number(&gate, "beta3") < 1.0).count();
    assert_eq!(below, squares.len() / 2, "beta3 puts half of the steps below a gate of 1/2");
    assert!(number(&gate, "alpha1") >= 1.0);
}

/// The presets of language models, cut down by `--set` alone, where there is no hub.
#[test]
fn the_language_tasks_compare_other_models_on_local_files_offline() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = fixture("stories260K").display().to_string();
    let [problems, threads] = ["gsm8k", "oasst"].map(|name| fixture(&format!("finetune/{name}.jsonl")));
    let files = |path: &Path| {
        let path = path.display();
        vec![format!("data.source=['{path}']"), format!("data.validation.source=['{path}']")]
    };
    let init = format!("model.init={model}");
    let gpt2 = ["n_layer=1", "n_head=2", "n_embd=16", "n_inner=32", "n_positions=64", "vocab_size=512"]
        .map(|shape| format!("model.{shape}"));
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let gpt2_rows = words(&["train.sequence_length=64", "train.tokens_per_step=128", "data.text_column=question"]);
    let exam = words(&["data.too_long=drop", "train.eval_exact_match=2", "train.exact_match_tokens=8"]);
    let tasks = [
        ("gpt2", [files(&problems), gpt2.to_vec(), gpt2_rows, vec![format!("tokenizer.source={model}")]].concat()),
        ("gsm8k", [files(&problems), exam, vec![init.clone(), "train.tokens_per_step=1024".into()]].concat()),
        ("oasst2", [files(&threads), vec![init, "train.tokens_per_step=512".into()]].concat()),
    ];
    for (task, settings) in tasks {
        let out = folder.path().join(task);
        let mut command = vrtrain();
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", folder.path().join("home"));
        command.args(["compare", "--task", task, "--optimizers", "vradam,adamw", "--seeds", "1", "--json", "--out"]);
        command.arg(&out).args([
            "--set",
            "train.steps=2",
            "--set",
            "train.micro_batch=1",
            "--set",
            "train.eval_every=1",
        ]);
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        let results = json(&succeed(&mut command));
        assert_eq!(results["paired"], true, "{task}");
        for row in results["rows"].as_array().expect("rows") {
            assert_eq!(row["finished"], 1, "{task}: {row}");
            assert!(row["val_loss"]["mean"].as_f64().is_some_and(f64::is_finite), "{task}: {row}");
        }
        assert_eq!(metrics(&out.join("runs/adamw-seed-1")).len(), 2, "{task}");
    }
}

/// PyTorch's largest eigenvalues at the fixture's initial weights (scripts/lab_numbers.py), exact second derivatives.
#[test]
fn the_sharpness_of_a_gpt2_is_pytorchs() {
    let text = std::fs::read_to_string(fixture("lab/pytorch.json")).expect("the fixture");
    let expected: Value = serde_json::from_str(&text).expect("JSON");
    let folder = tempfile::tempdir().expect("a folder");
    let run_dir = folder.path().join("run");
    let config = fixture("train/vradam-accumulated/run.toml");
    // One step that moves no weight by as much as its last bit.
    let assignments = ["optimizer.lr=1e-30", "train.steps=1", "schedule.warmup_steps=0"];
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(&run_dir);
    for assignment in assignments {
        command.args(["--set", assignment]);
    }
    succeed(&mut command);
    let output =
        succeed(vrtrain().args(["sharpness", "--json", "--examples", "4", "--iterations", "24"]).arg(&run_dir));
    let measured = json(&output)["measurements"][0].clone();
    let ours = measured["sharpness"][0].as_f64().expect("a number");
    let theirs = expected["gpt2_sharpness"]["largest"][0].as_f64().expect("a number");
    assert!((ours / theirs - 1.0).abs() < 1e-4, "{ours} {theirs}");
    assert!(number(&measured, "residual") < 0.1 && number(&measured, "difference_error") < 1e-3, "{measured}");
    let refused = run(vrtrain().arg("sharpness").arg(folder.path()));
    assert_eq!(refused.status.code(), Some(2));
}
