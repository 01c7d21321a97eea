//! `vrtrain chat`: a conversation through the model's chat template, at a terminal or from lines of a pipe.

use super::Ending;
use super::stop_signal::StopSignal;
use super::target::Target;
use crate::config::ConfigError;
use crate::data::{ChatTemplate, ChatTokenizer, Message, ReplyOpening, TextTokenizer};
use crate::generate::{End, Flow, Limits, Sampler, SamplingOptions, SpecialTokens, TextStream, complete};
use crate::model::Decoder;
use crate::ops::product::Precision;
use crate::params::ParameterStore;
use anyhow::{Context, Result, ensure};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{BufRead, IsTerminal, Write};

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub target: String,
    pub system: Option<String>,
    pub max_new_tokens: usize,
    pub temperature: f64,
    pub top_k: Option<usize>,
    pub top_p: Option<f64>,
    pub seed: u64,
    pub precision: Precision,
}

const HELP: &str = "/reset begins anew, /exit (or Ctrl-D) leaves, Ctrl-C stops a reply";

/// Talks until the input ends.
pub fn run(options: &Options) -> Result<Ending> {
    let target = Target::open(&options.target)?;
    let Some(template) = target.chat_template()? else {
        let message = format!(
            "{} has no chat template (chat_template of tokenizer_config.json, or chat_template.jinja): `vrtrain generate` \
             continues plain text",
            options.target
        );
        return Err(ConfigError::flag("RUN|MODEL", message).into());
    };
    let tokenizer = target.tokenizer()?.with_context(|| format!("{} has no tokenizer", options.target))?;
    let sampling = SamplingOptions { temperature: options.temperature, top_k: options.top_k, top_p: options.top_p };
    let drawn = tokenizer.vocabulary_size().min(target.config.vocab_size());
    let sampler =
        Sampler::new(sampling, drawn, options.seed).map_err(|error| ConfigError::flag("chat", error.to_string()))?;
    let mut end_of_text = target.config.end_of_text().to_vec();
    end_of_text.extend([tokenizer.end_of_text(), tokenizer.end_of_answer()]);
    let (store, model) = target.load_decoder(options.precision)?;
    let stop = StopSignal::install()?;
    let max_new_tokens = options.max_new_tokens;
    let written = ChatTokenizer::new(&tokenizer)?;
    let mut chat = Chat {
        template,
        tokenizer,
        written,
        store,
        model,
        sampler,
        end_of_text,
        max_new_tokens,
        stop,
        messages: vec![],
    };
    chat.reset(options);
    chat.check()?;
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        eprintln!("{} ({HELP})", options.target);
        at_terminal(options, &mut chat)?;
        Ok(Ending::Done)
    } else {
        from_pipe(options, &mut chat)
    }
}

/// What a person's line asks for.
enum Line<'a> {
    Nothing,
    Exit,
    Reset,
    /// A command that there is not.
    Unknown(&'a str),
    Say(&'a str),
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        match line.trim() {
            "" => Self::Nothing,
            "/exit" | "/quit" => Self::Exit,
            "/reset" => Self::Reset,
            command if command.starts_with('/') && !command.contains(' ') => Self::Unknown(command),
            text => Self::Say(text),
        }
    }
}

/// Whether the conversation goes on.
#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    Leave,
}

fn take(options: &Options, chat: &mut Chat, line: &str) -> Result<Next> {
    match Line::parse(line) {
        Line::Nothing => {}
        Line::Exit => return Ok(Next::Leave),
        Line::Reset => {
            chat.reset(options);
            eprintln!("(the conversation begins anew)");
        }
        Line::Unknown(command) => eprintln!("there is no {command}: {HELP}"),
        Line::Say(text) => chat.reply(text)?,
    }
    Ok(Next::GoOn)
}

fn at_terminal(options: &Options, chat: &mut Chat) -> Result<()> {
    let mut editor = DefaultEditor::new().context("cannot open the terminal")?;
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                // A line that cannot be remembered is still said.
                let _ = editor.add_history_entry(&line);
                chat.stop.heed();
                if take(options, chat, &line)? == Next::Leave {
                    return Ok(());
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("({HELP})"),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("cannot read a line"),
        }
    }
}

/// Answers every line. Ctrl-C stops the reply, and with it the command: there is nobody to go on talking.
fn from_pipe(options: &Options, chat: &mut Chat) -> Result<Ending> {
    let mut lines = std::io::stdin().lock().lines();
    loop {
        chat.stop.leave_at_once();
        let Some(line) = lines.next() else { return Ok(Ending::Done) };
        chat.stop.heed();
        if take(options, chat, &line.context("cannot read standard input")?)? == Next::Leave {
            return Ok(Ending::Done);
        }
        if chat.stop.requested() {
            return Ok(Ending::Stopped);
        }
    }
}

/// The conversation, and what answers.
struct Chat {
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    /// Makes ids of the conversation.
    written: ChatTokenizer,
    store: ParameterStore,
    model: Decoder,
    sampler: Sampler,
    end_of_text: Vec<u32>,
    max_new_tokens: usize,
    stop: StopSignal,
    messages: Vec<Message>,
}

impl Chat {
    fn reset(&mut self, options: &Options) {
        self.messages = options.system.iter().map(|system| Message::new("system", system.as_str())).collect();
    }

    /// Whether the template takes such a conversation, and the context has room for it.
    fn check(&self) -> Result<()> {
        let mut messages = self.messages.clone();
        messages.push(Message::new("user", "Hello"));
        let room = self.room()?;
        let length = self.written.ids(&self.template, &messages, ReplyOpening::Add)?.len();
        ensure!(length <= room, "the system prompt takes {length} tokens, {room} fit beside a reply");
        Ok(())
    }

    /// Tokens of the conversation that fit beside a reply.
    fn room(&self) -> Result<usize> {
        let (context, reply) = (self.model.n_positions(), self.max_new_tokens);
        if reply == 0 || reply >= context {
            let message = format!("it must be at least 1 and leave room in the context of {context}");
            return Err(ConfigError::flag("--max-new-tokens", message).into());
        }
        Ok(context - reply)
    }

    /// Says `text` and streams what the model answers. Exchanges that no longer fit are forgotten, the oldest first.
    fn reply(&mut self, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let room = self.room()?;
        let mut forgotten = 0;
        let ids = loop {
            let ids = self.written.ids(&self.template, &self.messages, ReplyOpening::Add)?;
            if ids.len() <= room {
                break ids;
            }
            let oldest = self.messages.iter().position(|message| message.role == "user");
            let Some(oldest) = oldest.filter(|&oldest| oldest + 2 < self.messages.len()) else {
                self.messages.pop();
                eprintln!("(that has {} tokens, {room} fit beside a reply: say less)", ids.len());
                return Ok(());
            };
            self.messages.drain(oldest..oldest + 2);
            forgotten += 1;
        };
        if forgotten > 0 {
            eprintln!(
                "(the context of {} tokens is full: the oldest {forgotten} exchanges are forgotten)",
                self.model.n_positions()
            );
        }
        let (reply, end) = self.stream(ids)?;
        match end {
            End::Stopped => eprintln!("(stopped)"),
            End::Length => eprintln!("(cut at {} tokens: --max-new-tokens)", self.max_new_tokens),
            End::EndOfText | End::Context => {}
        }
        self.messages.push(Message::new("assistant", reply));
        Ok(())
    }

    /// Completes the prompt and prints it as it comes.
    fn stream(&mut self, ids: Vec<u32>) -> Result<(String, End)> {
        let Self { tokenizer, store, model, sampler, end_of_text, max_new_tokens, stop, .. } = self;
        let mut stream = TextStream::new(tokenizer.tokenizer(), SpecialTokens::Hide);
        let mut reply = String::new();
        let limits = Limits { max_new_tokens: *max_new_tokens, end_of_text };
        let prompts = [ids];
        let mut on_token = |_: usize, token: u32| {
            let piece = stream.push(token)?;
            show(&piece)?;
            reply.push_str(&piece);
            Ok(if stop.requested() { Flow::Stop } else { Flow::Continue })
        };
        let completions =
            store.read(|weights| complete(model, weights, &prompts, limits, sampler, &mut on_token))??;
        let rest = stream.finish()?;
        show(&rest)?;
        reply.push_str(&rest);
        show("\n")?;
        let end = completions.first().context("no completion was made")?.end;
        Ok((reply, end))
    }
}

fn show(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to stdout")
}
