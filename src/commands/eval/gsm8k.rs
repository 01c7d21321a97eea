//! `--task gsm8k`: grade-school problems, answered greedily and graded by the last number.

use super::data::{Home, problems, rows, training_twin};
use super::samples::{self, Samples, digest};
use super::{Grader, Options, Progress, PromptStyle, Share};
use crate::commands::target::Target;
use crate::commands::{Ending, print_json};
use crate::config::ConfigError;
use crate::data::{ChatTemplate, ChatTokenizer, Message, Record, ReplyOpening, Template, TextTokenizer};
use crate::eval::gsm8k::{Calculator, Exemplars, Problem, Prompts, Style, chain_of_thought_shots};
use crate::generate::{
    Completion, End, Flow, Limits, Sampler, SamplingOptions, Scanned, SpecialTokens, StopScanner, TextStream,
    complete_in_turn,
};
use crate::ops::linear::FEW_ROWS;
use crate::ops::product::Precision;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;

const GSM8K: Home = Home { id: "openai/gsm8k", split: &["main/test-*.parquet", "*test*.parquet", "*test*.jsonl"] };
const TRAIN: [&str; 3] = ["main/train-*.parquet", "*train*.parquet", "*train*.jsonl"];
/// lm-evaluation-harness's numbers.
const SHOTS: usize = 5;
const SEED: u64 = 1234;
const MAX_NEW_TOKENS: usize = 256;
const BATCH: usize = 16;
/// The text that `finetune`'s configs train on; a run's own config says its.
const TEMPLATE: &str = "Question: {prompt}\nAnswer: ";

/// A problem ready to be asked.
struct Asked {
    prompt: String,
    ids: Vec<u32>,
    /// Tokens that were left out at the beginning.
    cut: usize,
}

/// Everything that decides the completions.
struct Plan {
    style: Style,
    exemplars: Exemplars,
    chat: Option<ChatTemplate>,
    max_new_tokens: usize,
}

/// Asks every problem and prints how many answers are right.
pub fn run(options: &Options) -> Result<Ending> {
    if let Some(path) = options.samples.as_deref()
        && !options.resume
    {
        samples::check_is_new(path)?;
    }
    let batch = options.batch.unwrap_or(BATCH);
    if batch == 0 || batch > FEW_ROWS {
        return Err(ConfigError::flag("--batch", format!("it must be between 1 and {FEW_ROWS}")).into());
    }
    let target = Target::open(&options.target)?;
    let tokenizer = target.tokenizer()?;
    let tokenizer =
        tokenizer.with_context(|| format!("{} has no tokenizer, and the problems are text", target.name))?;
    let mut problems: Vec<Problem> =
        self::problems(options.data.as_deref(), &options.files, &GSM8K)?.iter().map(problem).collect::<Result<_>>()?;
    let plan = plan(options, &target, problems.len())?;
    let limit = super::limited(options, problems.len());
    let asked = ask(&plan, &problems, limit, &tokenizer, target.config.n_positions())?;
    problems.truncate(limit);
    let cut = asked.iter().filter(|asked| asked.cut > 0).count();
    if cut > 0 {
        let most = asked.iter().map(|asked| asked.cut).max().unwrap_or(0);
        eprintln!(
            "{cut} of {limit} prompts do not fit into {} tokens beside {} new ones: cut on the left, by {most} at most",
            target.config.n_positions(),
            plan.max_new_tokens
        );
    }
    let mut settings = format!(
        "max_new_tokens={} calculator={} dtype={}",
        plan.max_new_tokens,
        options.calculator,
        if options.precision == Precision::Bf16 { "bf16" } else { "f32" }
    );
    if options.samples.is_some() {
        // A name may come to stand for other weights before the file is gone on with.
        settings += &format!(" weights={}", &target.weights_sha256()?[..16]);
    }
    let mut sheet = Sheet::open(options, &target.name, &settings, &problems, &asked, &plan.style)?;
    let prompts: Vec<Vec<u32>> = asked.iter().skip(sheet.done).map(|asked| asked.ids.clone()).collect();
    answer(options, &target, &tokenizer, &plan, &prompts, batch, &mut sheet)?;
    sheet.report(options, cut)
}

fn problem(row: &Record) -> Result<Problem> {
    Ok(Problem { question: row.text("question")?.to_owned(), answer: row.text("answer")?.to_owned() })
}

/// Settles how problems are put.
fn plan(options: &Options, target: &Target, problems: usize) -> Result<Plan> {
    let prompt = options.prompt.unwrap_or(PromptStyle::Harness);
    if options.template.is_some() && prompt != PromptStyle::Template {
        return Err(ConfigError::flag("--template", "it goes with --prompt template").into());
    }
    let template = match &options.template {
        // As `data.template`, of which the completion may be left out here.
        Some(text) => {
            let whole = if text.contains("{completion}") { text.clone() } else { format!("{text}{{completion}}") };
            let template = Template::parse(&whole).map_err(|why| ConfigError::flag("--template", why))?;
            template.question("{prompt}")
        }
        None if prompt == PromptStyle::Template => target.training_template()?.unwrap_or_else(|| TEMPLATE.to_owned()),
        None => TEMPLATE.to_owned(),
    };
    if !template.contains("{prompt}") {
        return Err(ConfigError::flag("--template", "it must hold {prompt}, the question's place").into());
    }
    if prompt == PromptStyle::ChainOfThought && options.grader == Some(Grader::OpenAi) {
        let message = "OpenAI's grader looks for `#### N`, which chains of thought do not write";
        return Err(ConfigError::flag("--grader", message).into());
    }
    let (style, default_shots) = match prompt {
        PromptStyle::Harness => (Style::Questions, SHOTS),
        PromptStyle::ChainOfThought => (Style::ChainOfThought, 8),
        PromptStyle::Template => (Style::Template(template), 0),
        PromptStyle::Chat => (Style::Template("{prompt}".to_owned()), 0),
    };
    let count = options.shots.unwrap_or(default_shots);
    let chat = match prompt {
        PromptStyle::Chat if count > 0 => {
            return Err(ConfigError::flag("--shots", "--prompt chat asks without examples").into());
        }
        PromptStyle::Chat => {
            Some(target.chat_template()?.with_context(|| format!("{} has no chat template", target.name))?)
        }
        _ => None,
    };
    let exemplars = exemplars(options, prompt, count, problems)?;
    if options.seed.is_some() && matches!(exemplars, Exemplars::Fixed(_)) {
        return Err(ConfigError::flag("--seed", "no examples are drawn here").into());
    }
    let context = target.config.n_positions();
    let max_new_tokens = options.max_new_tokens.unwrap_or(MAX_NEW_TOKENS.min(context / 2));
    if max_new_tokens == 0 || max_new_tokens >= context {
        let message = format!("it must be at least 1 and leave room for a prompt in the context of {context}");
        return Err(ConfigError::flag("--max-new-tokens", message).into());
    }
    if options.max_new_tokens.is_none() && max_new_tokens < MAX_NEW_TOKENS {
        eprintln!(
            "the context holds {context} tokens: at most {max_new_tokens} are written instead of {MAX_NEW_TOKENS}"
        );
    }
    Ok(Plan { style, exemplars, chat, max_new_tokens })
}

/// The examples before each question.
fn exemplars(options: &Options, prompt: PromptStyle, count: usize, problems: usize) -> Result<Exemplars> {
    let too_many = |most: usize| ConfigError::flag("--shots", format!("there are {most} examples to choose from"));
    if prompt == PromptStyle::ChainOfThought {
        let mut shots = match &options.shots_from {
            None => chain_of_thought_shots()?,
            Some(from) => training(from)?,
        };
        if count > shots.len() {
            return Err(too_many(shots.len()).into());
        }
        shots.truncate(count);
        return Ok(Exemplars::Fixed(shots));
    }
    if count == 0 {
        return match options.shots_from {
            Some(_) => Err(ConfigError::flag("--shots-from", "no examples are asked for").into()),
            None => Ok(Exemplars::Fixed(Vec::new())),
        };
    }
    let seed = options.seed.unwrap_or(SEED);
    let data = options.data.as_deref();
    let from = match (&options.shots_from, data.map(Path::new)) {
        (Some(from), _) => training(from)?,
        (None, Some(path)) if path.is_file() => match training_twin(path) {
            Some(twin) => {
                eprintln!("examples come from {}", twin.display());
                training(&twin.to_string_lossy())?
            }
            None => {
                eprintln!("there is no training file beside {}: examples are other problems of it", path.display());
                if count + 1 > problems {
                    let message = format!(
                        "{count} examples beside each question need {} problems, there are {problems}: name a file of \
                         examples with --shots-from, or ask without (--shots 0)",
                        count + 1
                    );
                    return Err(ConfigError::flag("--shots", message).into());
                }
                return Ok(Exemplars::DrawnFromOthers { count, seed });
            }
        },
        (None, _) => training(data.unwrap_or(GSM8K.id))?,
    };
    if count > from.len() {
        return Err(too_many(from.len()).into());
    }
    Ok(Exemplars::Drawn { from, count, seed })
}

fn training(from: &str) -> Result<Vec<Problem>> {
    rows(from, &[], &TRAIN, "--shots-from")?.iter().map(problem).collect()
}

/// The prompts of the first `limit` problems as ids; what does not fit beside the new tokens is cut on the left.
fn ask(
    plan: &Plan,
    problems: &[Problem],
    limit: usize,
    tokenizer: &TextTokenizer,
    context: usize,
) -> Result<Vec<Asked>> {
    let mut prompts = Prompts::new(&plan.style, &plan.exemplars);
    let room = context - plan.max_new_tokens;
    let (texts, chats) = (tokenizer.text_encoder()?, ChatTokenizer::new(tokenizer)?);
    (0..limit)
        .map(|index| {
            let mut prompt = prompts.next(problems, index);
            let mut ids = match &plan.chat {
                Some(chat) => {
                    let messages = [Message::new("user", prompt)];
                    prompt = chat.render(&messages, ReplyOpening::Add)?;
                    chats.ids(chat, &messages, ReplyOpening::Add)?
                }
                None => texts.first(&prompt)?,
            };
            let cut = ids.len().saturating_sub(room);
            ids.drain(..cut);
            Ok(Asked { prompt, ids, cut })
        })
        .collect()
}

/// A completion that is being written, as text.
struct Text<'a> {
    stream: Option<TextStream<'a>>,
    scanner: StopScanner,
    calculator: Option<Calculator>,
    text: String,
    stopped: bool,
}

impl<'a> Text<'a> {
    fn new(tokenizer: &'a TextTokenizer, stops: Vec<String>, calculator: bool) -> Result<Self> {
        Ok(Self {
            stream: Some(TextStream::new(tokenizer.tokenizer(), SpecialTokens::Hide)),
            scanner: StopScanner::new(stops)?,
            calculator: calculator.then(Calculator::default),
            text: String::new(),
            stopped: false,
        })
    }

    fn scan(&mut self, piece: &str) {
        match self.scanner.push(piece) {
            Scanned::More(text) => self.text += &text,
            Scanned::Stopped(text) => {
                self.text += &text;
                self.stopped = true;
            }
        }
    }

    /// The text that a token completes, up to a stop.
    fn read(&mut self, token: u32) -> Result<String> {
        let Some(stream) = &mut self.stream else { return Ok(String::new()) };
        let piece = stream.push(token)?;
        self.scan(&piece);
        Ok(piece)
    }

    fn push(&mut self, token: u32, tokenizer: &TextTokenizer) -> Result<Flow> {
        let piece = self.read(token)?;
        if self.stopped {
            return Ok(Flow::Stop);
        }
        let Some(result) = self.calculator.as_mut().and_then(|calculator| calculator.push(&piece)) else {
            return Ok(Flow::Continue);
        };
        let inserted = tokenizer.encode(&result)?;
        for &token in &inserted {
            self.read(token)?;
        }
        Ok(Flow::Insert(inserted))
    }

    fn finish(mut self) -> Result<String> {
        if !self.stopped
            && let Some(stream) = self.stream.take()
        {
            self.scan(&stream.finish()?);
            if !self.stopped {
                self.text += &self.scanner.finish();
            }
        }
        Ok(self.text)
    }
}

/// Completes the prompts that are not answered yet.
fn answer(
    options: &Options,
    target: &Target,
    tokenizer: &TextTokenizer,
    plan: &Plan,
    prompts: &[Vec<u32>],
    batch: usize,
    sheet: &mut Sheet,
) -> Result<()> {
    let (store, mut model) = target.load_decoder(options.precision)?;
    let vocabulary = target.config.vocab_size();
    let drawn = tokenizer.vocabulary_size().min(vocabulary);
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, drawn, 0)?;
    let mut end_of_text = target.config.end_of_text().to_vec();
    end_of_text.extend([tokenizer.end_of_text(), tokenizer.end_of_answer()]);
    let limits = Limits { max_new_tokens: plan.max_new_tokens, end_of_text: &end_of_text };
    let mut texts: Vec<Option<Text>> = (0..prompts.len()).map(|_| None).collect();
    let start = || Text::new(tokenizer, plan.style.stops(), options.calculator);
    let first = sheet.done;
    let texts = std::cell::RefCell::new(&mut texts);
    store.read(|weights| {
        complete_in_turn(
            &mut model,
            weights,
            prompts,
            batch,
            limits,
            &mut |_, logits| Ok(sampler.next(logits)?),
            &mut |prompt, token| {
                let slot = &mut texts.borrow_mut()[prompt];
                let text = match slot {
                    Some(text) => text,
                    None => slot.insert(start()?),
                };
                text.push(token, tokenizer)
            },
            &mut |prompt, completion| {
                let text = texts.borrow_mut()[prompt].take();
                let text = text.map_or(Ok(String::new()), Text::finish)?;
                sheet.answer(first + prompt, &text, &completion)
            },
        )
    })?
}

/// The answers and what they are worth.
struct Sheet<'a> {
    style: &'a Style,
    grader: Grader,
    model: &'a str,
    settings: &'a str,
    problems: &'a [Problem],
    asked: &'a [Asked],
    samples: Samples,
    /// Answers that an earlier command gave, and all of them.
    done: usize,
    answered: usize,
    strict: usize,
    flexible: usize,
    openai: usize,
    /// Completions without an end of their own.
    unfinished: usize,
    /// Tokens written by this command.
    tokens: usize,
    progress: Progress,
}

impl<'a> Sheet<'a> {
    fn open(
        options: &Options,
        model: &'a str,
        settings: &'a str,
        problems: &'a [Problem],
        asked: &'a [Asked],
        style: &'a Style,
    ) -> Result<Self> {
        // Every reference has an answer, or nothing is asked.
        for (index, problem) in problems.iter().enumerate() {
            style.judge("", &problem.answer).with_context(|| format!("problem {index}"))?;
        }
        let grader = options.grader.unwrap_or(Grader::Harness);
        let progress = Progress::start();
        let none = Samples::create(None)?;
        let mut sheet = Self {
            style,
            grader,
            model,
            settings,
            problems,
            asked,
            samples: none,
            done: 0,
            answered: 0,
            strict: 0,
            flexible: 0,
            openai: 0,
            unfinished: 0,
            tokens: 0,
            progress,
        };
        let path = options.samples.as_deref();
        match path.filter(|path| options.resume && path.exists()) {
            None => sheet.samples = Samples::create(path)?,
            Some(path) => {
                let present = samples::read(path)?;
                ensure!(present.samples.len() <= asked.len(), "{} has more samples than problems", path.display());
                for (index, sample) in present.samples.iter().enumerate() {
                    sheet.take_over(index, sample).with_context(|| path.display().to_string())?;
                }
                sheet.done = present.samples.len();
                eprintln!("{} problems were answered before: going on with the next", sheet.done);
                sheet.samples = Samples::go_on(path, &present)?;
            }
        }
        Ok(sheet)
    }

    /// Counts a sample of an earlier command.
    fn take_over(&mut self, index: usize, sample: &Value) -> Result<()> {
        let same = sample["prompt_sha256"] == digest(&self.asked[index].prompt)
            && sample["model"] == self.model
            && sample["settings"] == self.settings
            && sample["metric"] == self.metric();
        ensure!(same, "problem {index} was asked of another model or with other settings: name another file");
        let completion = sample["completion"].as_str().with_context(|| format!("problem {index} has no completion"))?;
        self.count(index, completion, sample["end"] == End::Length.word())?;
        Ok(())
    }

    fn count(&mut self, index: usize, text: &str, unfinished: bool) -> Result<crate::eval::gsm8k::Verdict> {
        let verdict = self.style.judge(text, &self.problems[index].answer)?;
        self.answered += 1;
        self.strict += usize::from(verdict.grade.strict);
        self.flexible += usize::from(verdict.grade.flexible);
        self.openai += usize::from(verdict.grade.openai);
        self.unfinished += usize::from(unfinished);
        Ok(verdict)
    }

    /// What `right` means in the samples.
    fn metric(&self) -> &'static str {
        match self.grader {
            Grader::Harness => "strict",
            Grader::OpenAi => "openai",
        }
    }

    fn answer(&mut self, index: usize, text: &str, completion: &Completion) -> Result<()> {
        let verdict = self.count(index, text, completion.end == End::Length)?;
        self.tokens += completion.ids.len();
        let right = match self.grader {
            Grader::Harness => verdict.grade.strict,
            Grader::OpenAi => verdict.grade.openai,
        };
        let Asked { prompt, ids, cut } = &self.asked[index];
        let sample = json!({
            "index": index,
            "task": "gsm8k",
            "metric": self.metric(),
            "model": self.model,
            "settings": self.settings,
            "problem_sha256": digest(&self.problems[index].question),
            "prompt_sha256": digest(prompt),
            "prompt_tokens": ids.len(),
            "cut_tokens": cut,
            "completion": text,
            "completion_tokens": completion.ids.len(),
            "end": completion.end.word(),
            "extracted": { "strict": verdict.strict, "flexible": verdict.flexible, "openai": verdict.openai },
            "strict": verdict.grade.strict,
            "flexible": verdict.grade.flexible,
            "openai": verdict.grade.openai,
            "right": right,
        });
        self.samples.put(index, sample)?;
        let (answered, all, strict, tokens) = (self.answered, self.asked.len(), self.strict, self.tokens);
        self.progress.tell(|elapsed| {
            let rate = tokens as f64 / elapsed.as_secs_f64();
            format!("{answered} of {all} problems, {strict} right (strict), {rate:.0} new tokens/s")
        });
        Ok(())
    }

    fn report(self, options: &Options, cut: usize) -> Result<Ending> {
        let n = self.answered;
        let [strict, flexible, openai] = [self.strict, self.flexible, self.openai].map(|right| Share::of(right, n));
        let seconds = self.progress.elapsed().as_secs_f64();
        eprintln!(
            "{} tokens written in {seconds:.1} s; {} of {n} completions reached the limit of new tokens",
            self.tokens, self.unfinished
        );
        match (self.grader, options.json) {
            (Grader::Harness, true) => print_json(&json!({
                "strict": strict.value,
                "flexible": flexible.value,
                "stderr": strict.standard_error,
                "flexible_stderr": flexible.standard_error,
                "cut_prompts": cut,
                "n": n,
            }))?,
            (Grader::OpenAi, true) => print_json(&json!({
                "openai": openai.value,
                "stderr": openai.standard_error,
                "cut_prompts": cut,
                "n": n,
            }))?,
            (Grader::Harness, false) => {
                println!("gsm8k: strict {strict}, flexible {flexible}, over {n} problems");
            }
            (Grader::OpenAi, false) => println!("gsm8k (OpenAI's grader): {openai}, over {n} problems"),
        }
        Ok(Ending::Done)
    }
}
