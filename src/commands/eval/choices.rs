//! `--task hellaswag` and `--task lambada`: given continuations, scored.

use super::data::{Home, problems};
use super::samples::{Samples, check_is_new, digest};
use super::{Options, Progress, Share};
use crate::commands::target::Target;
use crate::commands::{Ending, print_json};
use crate::data::{Record, TextEncoder};
use crate::eval::continuation::{Example, Score, score};
use crate::eval::hellaswag::Item;
use crate::model::Decoder;
use crate::ops::product::Precision;
use anyhow::{Context, Result, ensure};
use serde_json::json;

const HELLASWAG: Home =
    Home { id: "Rowan/hellaswag", split: &["data/validation-*.parquet", "*val*.parquet", "*val*.jsonl"] };
const LAMBADA: Home = Home {
    id: "EleutherAI/lambada_openai",
    split: &["data/lambada_test_en.jsonl", "default/test-*.parquet", "*test*.parquet", "*test*.jsonl"],
};

/// HellaSwag: four endings a context.
pub fn hellaswag(options: &Options) -> Result<Ending> {
    let (target, encoder, rows) = open(options, &HELLASWAG)?;
    let items: Vec<Item> = rows.iter().map(item).collect::<Result<_>>()?;
    let mut examples = Vec::new();
    for item in &items {
        let context = ids(&encoder, &item.context)?;
        for ending in &item.endings {
            examples.push(Example::new(&context, ids(&encoder, &format!("{} {ending}", item.context))?));
        }
    }
    let scores = scored(options, &target, examples, "endings")?;
    let mut samples = Samples::create(options.samples.as_deref())?;
    let (mut total, mut by_characters, mut by_tokens) = (0, 0, 0);
    for ((index, item), scores) in items.iter().enumerate().zip(scores.chunks_exact(4)) {
        let choice = item.choose(scores);
        total += usize::from(choice.total == item.label);
        by_characters += usize::from(choice.by_characters == item.label);
        by_tokens += usize::from(choice.by_tokens == item.label);
        let sample = json!({
            "index": index,
            "task": "hellaswag",
            "metric": "acc_norm",
            "model": target.name,
            "problem_sha256": digest(&item.context),
            "prompt_sha256": digest(&item.context),
            "nll": scores.iter().map(|score| score.nll).collect::<Vec<_>>(),
            "tokens": scores.iter().map(|score| score.tokens).collect::<Vec<_>>(),
            "chosen": choice.by_characters,
            "label": item.label,
            "right": choice.by_characters == item.label,
        });
        samples.put(index, sample)?;
    }
    let n = items.len();
    let [acc, acc_norm, acc_norm_tokens] = [total, by_characters, by_tokens].map(|right| Share::of(right, n));
    if options.json {
        print_json(&json!({
            "acc": acc.value,
            "acc_norm": acc_norm.value,
            "acc_norm_tokens": acc_norm_tokens.value,
            "stderr": acc_norm.standard_error,
            "n": n,
        }))?;
    } else {
        println!("hellaswag: acc {acc}, acc_norm {acc_norm}, acc_norm by tokens {acc_norm_tokens}, over {n} items");
    }
    Ok(Ending::Done)
}

/// A row of the data set itself, or one whose context holds the activity already.
fn item(row: &Record) -> Result<Item> {
    let endings = row.value("endings")?.as_array();
    let endings: Option<Vec<String>> =
        endings.and_then(|endings| endings.iter().map(|ending| Some(ending.as_str()?.to_owned())).collect());
    let endings = endings.with_context(|| format!("{}: `endings` is not a list of texts", row.place()))?;
    ensure!(endings.len() == 4, "{}: it has {} endings instead of 4", row.place(), endings.len());
    // A number, or the number's digits.
    let label = row.value("label")?;
    let label = label.as_u64().or_else(|| label.as_str()?.parse().ok()).filter(|&label| label < 4);
    let label = label.with_context(|| format!("{}: `label` is not one of 0, 1, 2, 3", row.place()))? as usize;
    if row.get("activity_label").is_some() {
        let [activity, a, b] = ["activity_label", "ctx_a", "ctx_b"].map(|name| row.text(name));
        return Ok(Item::of_activity(activity?, a?, b?, &endings, label));
    }
    Ok(Item::cleaned(row.text("ctx")?, &endings, label))
}

/// LAMBADA: the last word of each text.
pub fn lambada(options: &Options) -> Result<Ending> {
    let (target, encoder, rows) = open(options, &LAMBADA)?;
    let column = options.text_column.as_deref().unwrap_or("text");
    let (mut examples, mut texts) = (Vec::new(), Vec::new());
    for row in &rows {
        let text = row.text(column)?;
        let (context, _) = text.rsplit_once(' ').with_context(|| format!("{}: its text is one word", row.place()))?;
        examples.push(Example::new(&ids(&encoder, context)?, ids(&encoder, text)?));
        texts.push(text);
    }
    let scores = scored(options, &target, examples, "texts")?;
    let mut samples = Samples::create(options.samples.as_deref())?;
    for ((index, text), score) in texts.iter().enumerate().zip(&scores) {
        let sample = json!({
            "index": index,
            "task": "lambada",
            "metric": "acc",
            "model": target.name,
            "problem_sha256": digest(text),
            "prompt_sha256": digest(text),
            "nll": score.nll,
            "tokens": score.tokens,
            "right": score.greedy,
        });
        samples.put(index, sample)?;
    }
    let n = scores.len();
    let acc = Share::of(scores.iter().filter(|score| score.greedy).count(), n);
    let nll: f64 = scores.iter().map(|score| score.nll).sum();
    let per_token = nll / scores.iter().map(|score| score.tokens).sum::<usize>() as f64;
    let perplexity = (nll / n as f64).exp();
    if options.json {
        let (value, error) = (acc.value, acc.standard_error);
        print_json(
            &json!({ "acc": value, "nll_per_token": per_token, "perplexity": perplexity, "stderr": error, "n": n }),
        )?;
    } else {
        println!(
            "lambada: acc {acc}, {per_token:.4} nats a token, perplexity {perplexity:.4} of the last word, over {n} texts"
        );
    }
    Ok(Ending::Done)
}

/// The model, what makes ids of texts, and the first `--limit` rows.
fn open(options: &Options, home: &Home) -> Result<(Target, TextEncoder, Vec<Record>)> {
    if let Some(path) = &options.samples {
        check_is_new(path)?;
    }
    let target = Target::open(&options.target)?;
    let tokenizer = target.tokenizer()?;
    let tokenizer = tokenizer.with_context(|| format!("{} has no tokenizer, and the task is text", target.name))?;
    let mut rows = problems(options.data.as_deref(), &options.files, home)?;
    rows.truncate(super::limited(options, rows.len()));
    Ok((target, tokenizer.text_encoder()?, rows))
}

/// The ids of a text, begin-of-text included where the tokenizer adds it.
fn ids(encoder: &TextEncoder, text: &str) -> Result<Vec<u32>> {
    encoder.first(text)
}

/// The scores of the examples; one that is too long for the context loses its beginning, and is counted.
fn scored(options: &Options, target: &Target, mut examples: Vec<Example>, what: &str) -> Result<Vec<Score>> {
    let context = target.config.n_positions();
    let cut: usize = examples.iter_mut().map(|example| usize::from(example.cut(context))).sum();
    if cut > 0 {
        eprintln!(
            "{cut} of {} {what} were longer than the context of {context} tokens: cut on the left",
            examples.len()
        );
    }
    let all = examples.len();
    let mut store = target.load()?;
    if options.precision == Precision::Bf16 {
        store.keep_rounded()?;
    }
    let mut model = Decoder::with_precision(&target.config, store.layout(), options.precision);
    let mut progress = Progress::start();
    let scores = store.read(|weights| {
        score(&mut model, weights, &examples, &mut |done| {
            progress.tell(|elapsed| format!("{done} of {all} {what}, {:.0} s", elapsed.as_secs_f64()));
        })
    })??;
    eprintln!("{all} {what} scored in {:.1} s", progress.elapsed().as_secs_f64());
    Ok(scores)
}
