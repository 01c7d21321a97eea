//! eval, chat and generate on many prompts: the binary on a small trained model, and on SmolLM2 where it is.

mod common;

use anyhow::{Context, Result};
use common::*;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn evaluate(model: &Path, arguments: &[&str]) -> Command {
    let mut command = vrtrain();
    command.arg("eval").arg(model).args(arguments);
    command
}

fn object(output: &std::process::Output) -> Result<Value> {
    serde_json::from_str(stdout(output).trim()).with_context(|| stdout(output))
}

fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// The five test problems and thirty training problems of the fixture as files.
fn problems(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let text = std::fs::read_to_string(fixture("gsm8k/prompts.json"))?;
    let all: Value = serde_json::from_str(&text)?;
    let write = |split: &str| -> Result<PathBuf> {
        let path = folder.join(format!("{split}.jsonl"));
        let rows = all[split].as_array().context("problems")?;
        std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>())?;
        Ok(path)
    };
    Ok((write("test")?, write("train")?))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn gsm8k_is_asked_in_every_way_and_the_batch_changes_no_answer() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (test, _) = problems(folder.path())?;
    let model = fixture("stories260K");
    let mut first: Option<Vec<Value>> = None;
    for batch in ["1", "5"] {
        let samples = folder.path().join(format!("batch-{batch}.jsonl"));
        let arguments = [
            "--task",
            "gsm8k",
            "--json",
            "--max-new-tokens",
            "40",
            "--batch",
            batch,
            "--samples",
            text(&samples),
            "--data",
        ];
        let output = succeed(evaluate(&model, &arguments).arg(&test));
        // The training problems lie beside the test problems; the context of 512 tokens cuts prompts of five examples.
        assert!(stderr(&output).contains("train.jsonl"), "{}", stderr(&output));
        assert!(stderr(&output).contains("cut on the left"), "{}", stderr(&output));
        let result = object(&output)?;
        assert_eq!((&result["n"], &result["strict"]), (&json!(5), &json!(0.0)));
        let found = lines(&samples)?;
        assert_eq!(found.len(), 5);
        assert!(found.iter().all(|sample| sample["prompt_tokens"].as_u64() <= Some(472)));
        match &first {
            None => first = Some(found),
            Some(first) => assert_eq!(*first, found),
        }
    }
    for (arguments, shots) in [
        (&["--shots", "0"][..], 0),
        (&["--prompt", "cot", "--shots", "2"], 2),
        (&["--prompt", "template", "--calculator", "--grader", "openai"], 0),
        (&["--prompt", "template", "--template", "Q {prompt} A", "--shots", "1"], 1),
    ] {
        let mut command =
            evaluate(&model, &["--task", "gsm8k", "--json", "--limit", "2", "--max-new-tokens", "5", "--data"]);
        let result = object(&succeed(command.arg(&test).args(arguments)))?;
        assert_eq!(result["n"], 2, "{shots} shots");
        assert!(result["stderr"].is_number());
    }
    let mut command =
        evaluate(&model, &["--task", "gsm8k", "--shots", "0", "--limit", "9", "--max-new-tokens", "2", "--data"]);
    let output = succeed(command.arg(&test));
    assert!(stderr(&output).contains("--limit 9: there are 5 problems"), "{}", stderr(&output));
    Ok(())
}

#[test]
fn an_interrupted_gsm8k_goes_on_where_it_was_and_ends_the_same() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (test, _) = problems(folder.path())?;
    let model = fixture("stories260K");
    let samples = folder.path().join("samples.jsonl");
    let arguments =
        ["--task", "gsm8k", "--json", "--shots", "0", "--max-new-tokens", "20", "--data", text(&test), "--samples"];
    let whole = object(&succeed(evaluate(&model, &arguments).arg(&samples)))?;
    let written = std::fs::read_to_string(&samples)?;
    let again = run(evaluate(&model, &arguments).arg(&samples));
    assert_eq!(again.status.code(), Some(2), "{}", stderr(&again));
    assert_eq!(std::fs::read_to_string(&samples)?, written, "the file is not touched");

    // Two whole lines, and a third that was cut off.
    let cut = written.match_indices('\n').nth(1).context("two lines")?.0 + 30;
    std::fs::write(&samples, &written[..cut])?;
    let resumed = object(&succeed(evaluate(&model, &arguments).arg(&samples).arg("--resume")))?;
    assert_eq!(resumed, whole);
    assert_eq!(std::fs::read_to_string(&samples)?, written);

    std::fs::write(&samples, &written[..cut])?;
    let other = run(evaluate(&model, &arguments).arg(&samples).args(["--resume", "--calculator"]));
    assert!(!other.status.success() && stderr(&other).contains("other settings"), "{}", stderr(&other));
    Ok(())
}

#[test]
fn two_models_are_compared_on_the_same_problems() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, right: &dyn Fn(usize) -> bool, problem: &str| -> Result<PathBuf> {
        let path = folder.path().join(name);
        let sample = |index: usize| {
            json!({"index": index, "task": "gsm8k", "metric": "strict", "problem_sha256": format!("{problem}{index}"),
                   "prompt_sha256": "p", "right": right(index)})
        };
        std::fs::write(&path, (0..20).map(|index| format!("{}\n", sample(index))).collect::<String>())?;
        Ok(path)
    };
    let (a, b) =
        (write("a.jsonl", &|index| index < 10, "x")?, write("b.jsonl", &|index| (9..19).contains(&index), "x")?);
    let c = write("c.jsonl", &|_| true, "y")?;
    let result = object(&succeed(vrtrain().args(["eval", "--json", "--compare"]).args([&a, &b])))?;
    // scipy 1.17: binomtest(9, 18).pvalue = 1
    assert_eq!((&result["only_a"], &result["only_b"], &result["p_value"]), (&json!(9), &json!(9), &json!(1.0)));
    let other = run(vrtrain().args(["eval", "--compare"]).args([&a, &c]));
    assert!(stderr(&other).contains("problem 0 is another"), "{}", stderr(&other));
    Ok(())
}

#[test]
fn hellaswag_and_lambada_read_rows_and_name_what_is_wrong_with_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = fixture("stories260K");
    let file = |name: &str, rows: &[Value]| -> Result<PathBuf> {
        let path = folder.path().join(name);
        std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>())?;
        Ok(path)
    };
    let endings = json!(["went home.", "quantum table flies [x]", "saw a dog.", "is is is is"]);
    let joined = json!({"ctx": "Story: Once upon a time a girl", "label": 2, "endings": endings});
    let original = json!({"activity_label": "Story", "ctx_a": "Once upon a time", "ctx_b": "a girl", "label": "2",
                          "endings": endings, "ctx": "unused"});
    let samples = folder.path().join("samples.jsonl");
    let path = file("h.jsonl", &[joined.clone(), original])?;
    let mut command = evaluate(&model, &["--task", "hellaswag", "--json", "--samples", text(&samples), "--data"]);
    let result = object(&succeed(command.arg(&path)))?;
    assert_eq!(result["n"], 2);
    let found = lines(&samples)?;
    // "A girl" in place of "a girl" is the only difference between the two.
    assert_ne!(found[0]["nll"], found[1]["nll"]);
    for (row, said) in [
        (json!({"ctx": "a", "label": 4, "endings": endings}), "line 2 of"),
        (json!({"ctx": "a", "label": 1, "endings": ["x"]}), "1 endings instead of 4"),
        (json!({"ctx": "a", "endings": endings}), "\"label\" is missing"),
    ] {
        let path = file("bad.jsonl", &[joined.clone(), row])?;
        let output = run(evaluate(&model, &["--task", "hellaswag", "--data"]).arg(&path));
        assert!(output.status.code() == Some(1) && stderr(&output).contains(said), "{}", stderr(&output));
    }
    let path = file("l.jsonl", &[json!({"text": "Once upon a time"}), json!({"text": "Lily and her big red ball"})])?;
    let result = object(&succeed(evaluate(&model, &["--task", "lambada", "--json", "--data"]).arg(&path)))?;
    // The model greedily says "time" after "Once upon a".
    assert!(result["n"] == 2 && number(&result, "acc") >= 0.5 && number(&result, "nll_per_token") > 0.0, "{result}");
    Ok(())
}

#[test]
fn overlapping_windows_score_each_target_once_and_better() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = fixture("stories260K");
    let path = folder.path().join("story.txt");
    let story = "Once upon a time there was a little girl named Lily. She loved to play outside in the park. ";
    std::fs::write(&path, story.repeat(4))?;
    let measure = |arguments: &[&str]| -> Result<Value> {
        let mut command = evaluate(&model, &["--task", "perplexity", "--json", "--window", "32", "--data"]);
        object(&succeed(command.arg(&path).args(arguments)))
    };
    let (apart, same, over) = (measure(&[])?, measure(&["--stride", "32"])?, measure(&["--stride", "8"])?);
    assert_eq!(apart, same);
    assert_eq!(apart["tokens"], over["tokens"]);
    assert!(number(&over, "nll_per_token") < number(&apart, "nll_per_token"), "{over} {apart}");
    Ok(())
}

#[test]
fn flags_that_a_task_ignores_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("story.txt");
    std::fs::write(&file, "Once upon a time")?;
    let model = fixture("stories260K");
    for arguments in [
        &["--task", "gsm8k", "--window", "5"][..],
        &["--task", "hellaswag", "--shots", "5"],
        &["--task", "perplexity", "--limit", "5", "--data", "x"],
        &["--task", "perplexity"],
        &["--task", "lambada", "--resume"],
        &["--task", "gsm8k", "--batch", "33"],
        &["--task", "gsm8k", "--data", "nothing.jsonl"],
        &["--task", "gsm8k", "--data", text(&file), "--files", "*.jsonl"],
        &["--task", "perplexity", "--data", text(&file), "--files", "*.txt"],
        &["--task", "perplexity", "--data", text(&file), "--text-column", "body"],
        &["--task", "nothing"],
        &[],
    ] {
        let output = run(&mut evaluate(&model, arguments));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
    }
    Ok(())
}

#[test]
fn many_prompts_give_what_each_gives_alone_in_their_order() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = fixture("stories260K");
    let path = folder.path().join("prompts.jsonl");
    let prompts = ["Once upon a time", "The dog", "Lily and Tom went to the park. They", "A"];
    std::fs::write(&path, prompts.map(|prompt| format!("{}\n", json!({ "prompt": prompt }))).concat())?;
    for draws in [&["--temperature", "0"][..], &["--temperature", "1", "--seed", "7"]] {
        let many = |batch: &str| -> Result<Vec<Value>> {
            let mut command = vrtrain();
            command
                .arg("generate")
                .arg(&model)
                .args(["--max-new-tokens", "30", "--batch", batch, "--prompts"])
                .arg(&path);
            stdout(&succeed(command.args(draws))).lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
        };
        let together = many("3")?;
        assert_eq!(together, many("1")?);
        for (index, prompt) in prompts.iter().enumerate() {
            let seed = (7 + index).to_string();
            let mut command = vrtrain();
            command
                .arg("generate")
                .arg(&model)
                .args(["--max-new-tokens", "30", "--json", "--prompt", prompt])
                .args(&draws[..2]);
            let alone = object(&succeed(if draws.len() > 2 { command.args(["--seed", &seed]) } else { &mut command }));
            let alone = alone?;
            assert_eq!(
                (&together[index]["ids"], &together[index]["text"]),
                (&alone["ids"], &alone["text"]),
                "{prompt}"
            );
            assert_eq!(together[index]["prompt"], *prompt);
        }
    }
    Ok(())
}

/// The small model's folder with a chat template beside it.
fn chat_model(folder: &Path) -> Result<PathBuf> {
    let model = folder.join("model");
    std::fs::create_dir(&model)?;
    for entry in std::fs::read_dir(fixture("stories260K"))? {
        let entry = entry?;
        std::fs::copy(entry.path(), model.join(entry.file_name()))?;
    }
    let template = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}";
    std::fs::write(model.join("chat_template.jinja"), template)?;
    Ok(model)
}

#[test]
fn a_chat_reads_lines_from_a_pipe_and_answers_each() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = chat_model(folder.path())?;
    let talk = |input: &str| -> Result<std::process::Output> {
        let mut command = vrtrain();
        command.arg("chat").arg(&model).args(["--max-new-tokens", "12"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
        Ok(child.wait_with_output()?)
    };
    let output = talk("Once upon a time\n\n/reset\nOnce upon a time\n/what\n/exit\nnever said\n")?;
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stdout(&output);
    let replies: Vec<&str> = said.lines().collect();
    assert!(replies.len() == 2 && replies[0] == replies[1] && !replies[0].is_empty(), "{said}");
    assert!(stderr(&output).contains("there is no /what"), "{}", stderr(&output));
    let output = run(vrtrain().arg("chat").arg(fixture("gpt-nano-sort")));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no chat template"), "{}", stderr(&output));
    Ok(())
}

/// Sends Ctrl-C's signal and waits.
#[cfg(unix)]
fn interrupt(mut child: std::process::Child) -> Result<(Option<i32>, String)> {
    use std::io::Read;
    succeed(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let mut rest = String::new();
    child.stdout.take().context("a pipe")?.read_to_string(&mut rest)?;
    Ok((child.wait()?.code(), rest))
}

#[test]
#[cfg(unix)]
fn a_signal_ends_a_piped_chat_and_a_generation_with_what_was_written() -> Result<()> {
    use std::io::Read;
    let folder = tempfile::tempdir()?;
    let model = chat_model(folder.path())?;
    let mut first = [0];
    // While it answers: far more lines than it gets to.
    let lines = 3000;
    std::fs::write(folder.path().join("lines.txt"), "Once upon a time\n/reset\n".repeat(lines))?;
    let mut command = vrtrain();
    command.arg("chat").arg(&model).args(["--max-new-tokens", "200"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.stdin(std::fs::File::open(folder.path().join("lines.txt"))?).spawn()?;
    child.stdout.as_mut().context("a pipe")?.read_exact(&mut first)?;
    let (code, rest) = interrupt(child)?;
    assert_eq!(code, Some(130));
    assert!(rest.ends_with('\n') && rest.lines().count() < lines, "{} replies", rest.lines().count());
    // While it waits for a line, its reply of one line given.
    let mut command = vrtrain();
    command.arg("chat").arg(&model).args(["--max-new-tokens", "6"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("a pipe")?;
    input.write_all(b"Once upon a time\n")?;
    let mut last = 0;
    while last != b'\n' {
        child.stdout.as_mut().context("a pipe")?.read_exact(&mut first)?;
        last = first[0];
    }
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(interrupt(child)?, (Some(130), String::new()));

    // A generation may end before the signal comes: then again.
    let prompt = "Once upon a time";
    for _ in 0..50 {
        let mut command = vrtrain();
        command.arg("generate").arg(fixture("stories260K")).args(["--max-new-tokens", "500", "--prompt", prompt]);
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut given = vec![0; prompt.len() + 2];
        child.stdout.as_mut().context("a pipe")?.read_exact(&mut given)?;
        let (code, rest) = interrupt(child)?;
        if code == Some(130) {
            assert!(rest.ends_with('\n') && !rest.trim().is_empty(), "{rest:?}");
            return Ok(());
        }
        assert_eq!(code, Some(0));
    }
    anyhow::bail!("every generation was over before its signal")
}

#[test]
fn a_continuation_follows_its_prompt_with_the_space_between_them() -> Result<()> {
    let model = fixture("stories260K");
    for prompt in ["Lily and Tom went to the", "Once upon a"] {
        let generate = |extra: &[&str]| {
            let mut command = vrtrain();
            command.arg("generate").arg(&model).args(["--max-new-tokens", "8", "--prompt", prompt]).args(extra);
            succeed(&mut command)
        };
        let text = object(&generate(&["--json"]))?["text"].as_str().context("a text")?.to_owned();
        assert!(text.starts_with(' ') && !text.starts_with("  "), "{text:?}");
        assert_eq!(stdout(&generate(&[])), format!("{prompt}{text}\n"));
    }
    Ok(())
}

/// SmolLM2's folder and the shared data, where someone has both.
fn smollm2(test: &str) -> Option<(PathBuf, PathBuf)> {
    let folder = std::env::var_os("VRTRAIN_SMOLLM2").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipping {test}: VRTRAIN_SMOLLM2 is not set");
    }
    Some((folder?, shared(test)?.join("data")))
}

#[test]
fn smollm2_chooses_27_of_the_first_60_endings() -> Result<()> {
    let Some((model, data)) = smollm2("smollm2_chooses_27_of_the_first_60_endings") else { return Ok(()) };
    let path = data.join("hellaswag/hellaswag_val.jsonl");
    let mut command = evaluate(&model, &["--task", "hellaswag", "--json", "--limit", "60", "--data"]);
    let result = object(&succeed(command.arg(path)))?;
    eprintln!("{result}");
    assert_eq!((&result["acc_norm"], &result["n"]), (&json!(0.45), &json!(60)));
    Ok(())
}
