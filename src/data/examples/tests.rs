//! Examples against transformers' tokenizers, and what becomes of rows, long examples and positions.

use super::pack::{self, Packing};
use super::*;
use crate::config::TooLong;
use crate::data::chat_template::{ChatTemplate, Message, ReplyOpening};
use crate::data::chat_tokens::ChatTokenizer;
use crate::data::files::{FileKind, SourceFile};
use crate::data::order::Order;
use crate::data::{ChatFormat, CompletionFormat, ExampleFormat, ExampleLimits, MemoryFile, TextTokenizer};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn expected() -> Result<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(fixture("finetune/expected.json"))?)?)
}

fn stories() -> Result<TextTokenizer> {
    TextTokenizer::load(&fixture("stories260K"))
}

const LIMITS: ExampleLimits =
    ExampleLimits { row_length: 2000, too_long: TooLong::Error, vocabulary_size: 512, most: usize::MAX };

fn gsm8k() -> Result<ExampleFormat> {
    Ok(ExampleFormat::Completion(CompletionFormat {
        prompt_column: "question".into(),
        completion_column: "answer".into(),
        template: Template::parse("Question: {prompt}\nAnswer: {completion}").map_err(anyhow::Error::msg)?,
    }))
}

fn chat(template: &str) -> Result<ExampleFormat> {
    let template = ChatTemplate::new(template, Vec::new())?;
    Ok(ExampleFormat::Chat(Box::new(ChatFormat { messages_column: "messages".into(), template })))
}

fn lines(lines: &[Value]) -> Vec<SourceFile> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    vec![SourceFile { bytes: Arc::new(MemoryFile::new("x.jsonl", text.into_bytes())), kind: FileKind::Jsonl }]
}

fn local(name: &str) -> Result<Vec<SourceFile>> {
    Ok(vec![SourceFile::local(&fixture(name))?])
}

fn error<T>(result: Result<T>) -> String {
    result.err().map(|error| format!("{error:#}")).unwrap_or_default()
}

/// The ids and the places of learned tokens.
fn ids_and_learned(example: &Example) -> (Value, Value) {
    let learned: Vec<usize> = example.answers.iter().cloned().flatten().collect();
    (json!(example.ids), json!(learned))
}

#[test]
fn prompts_and_completions_have_transformers_ids_and_the_answer_alone_counts() -> Result<()> {
    let examples = Examples::read(&local("finetune/gsm8k.jsonl")?, &gsm8k()?, &stories()?, LIMITS)?;
    let expected = &expected()?["stories_gsm8k"];
    assert_eq!(examples.list().len(), 8);
    for (number, example) in examples.list().iter().enumerate() {
        let expected = &expected[number];
        assert_eq!(json!(example.ids), expected["ids"], "example {number}");
        assert_eq!(json!(example.answer_tokens()), expected["answer_tokens"], "example {number}");
        assert_eq!(example.answers.len(), 1);
        assert_eq!(example.answers[0].end, example.ids.len(), "the answer ends with the end token");
    }
    Ok(())
}

#[test]
fn conversations_have_transformers_ids_and_every_reply_counts_with_its_end_token() -> Result<()> {
    let expected = expected()?;
    let template = expected["chat_template"].as_str().context("a template")?;
    let examples = Examples::read(&local("finetune/oasst.jsonl")?, &chat(template)?, &stories()?, LIMITS)?;
    let cases = expected["stories_oasst"].as_array().context("threads")?;
    assert_eq!(examples.list().len(), cases.len(), "threads");
    for (number, (example, case)) in examples.list().iter().zip(cases).enumerate() {
        let (ids, learned) = ids_and_learned(example);
        assert_eq!(ids, case["ids"], "thread {number}");
        assert_eq!(learned, case["learned"], "thread {number}");
    }
    Ok(())
}

#[test]
fn real_tokenizers_give_transformers_counts() -> Result<()> {
    let Some(shared) = std::env::var_os("VRTRAIN_SHARED").map(PathBuf::from) else {
        println!("skipped: VRTRAIN_SHARED is not set");
        return Ok(());
    };
    let expected = expected()?;
    let check = |tokenizer: &str, file: &str, format: &ExampleFormat, key: &str| -> Result<()> {
        let tokenizer = TextTokenizer::load(&shared.join("data").join(tokenizer))?;
        let limits = ExampleLimits { vocabulary_size: usize::MAX, ..LIMITS };
        let examples = Examples::read(&local(file)?, format, &tokenizer, limits)?;
        let found = examples.list().iter().map(|example| {
            // transformers counted all of a conversation that has a loss, as the example does.
            json!({"tokens": example.ids.len(), "answer_tokens": example.answer_tokens()})
        });
        assert_eq!(json!(found.collect::<Vec<_>>()), expected[key], "{key}");
        Ok(())
    };
    check("tokenizers/gpt2", "finetune/gsm8k.jsonl", &gsm8k()?, "gpt2_gsm8k")?;
    let smollm = "models/smollm2-135m-instruct";
    check(smollm, "finetune/gsm8k.jsonl", &gsm8k()?, "smollm2_gsm8k")?;
    let template = ChatTemplate::load(&shared.join("data").join(smollm))?.context("a chat template")?;
    let format = ExampleFormat::Chat(Box::new(ChatFormat { messages_column: "messages".into(), template }));
    check(smollm, "finetune/oasst.jsonl", &format, "smollm2_oasst")
}

#[test]
fn message_rows_make_the_threads_of_the_trees() -> Result<()> {
    let text = std::fs::read_to_string(fixture("finetune/oasst.jsonl"))?;
    let mut rows = Vec::new();
    fn flatten(message: &Value, parent: Value, tree: &Value, rows: &mut Vec<Value>) {
        let mut row = message.clone();
        row["replies"] = Value::Null;
        row["parent_id"] = parent;
        row["message_tree_id"] = tree["message_tree_id"].clone();
        row["tree_state"] = tree["tree_state"].clone();
        rows.push(row);
        for reply in message["replies"].as_array().into_iter().flatten() {
            flatten(reply, message["message_id"].clone(), tree, rows);
        }
    }
    for line in text.lines() {
        let tree: Value = serde_json::from_str(line)?;
        flatten(&tree["prompt"], Value::Null, &tree, &mut rows);
    }
    let format = chat(&plain_template("</s>"))?;
    let trees = Examples::read(&local("finetune/oasst.jsonl")?, &format, &stories()?, LIMITS)?;
    let flat = Examples::read(&lines(&rows), &format, &stories()?, LIMITS)?;
    assert!(trees.list() == flat.list());

    let last = rows.len() - 1;
    rows[last]["parent_id"] = json!("nobody");
    rows.push(json!({"message_id": "a", "parent_id": null, "text": "t", "role": "prompter", "message_tree_id": "a",
        "tree_state": "growing", "deleted": false, "synthetic": false}));
    let counts = *Examples::read(&lines(&rows), &format, &stories()?, LIMITS)?.counts();
    assert_eq!((counts.orphans, counts.unready_trees), (1, 1));
    // A synthetic tree's roles are not looked at; those of the first that is not are.
    let root = rows.iter().position(|row| row["parent_id"].is_null() && row["synthetic"] == false);
    rows[root.context("a root")?]["role"] = json!("assistant");
    assert!(error(Examples::read(&lines(&rows), &format, &stories()?, LIMITS)).contains("do not alternate"));
    Ok(())
}

#[test]
fn plain_conversations_end_every_reply_with_the_end_token() -> Result<()> {
    let messages = json!([
        {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Ciao"}, {"from": "human", "value": "?"},
    ]);
    let tokenizer = stories()?;
    let examples =
        Examples::read(&lines(&[json!({"messages": messages})]), &chat(&plain_template("</s>"))?, &tokenizer, LIMITS)?;
    assert_eq!(examples.counts().unanswered, 1);
    assert!(examples.describe().contains("1 conversations without their last user turn"), "{}", examples.describe());
    let example = &examples.list()[0];
    let text = |ids: &[u32]| tokenizer.decode(ids);
    // This tokenizer begins anew, with a space, after a special token.
    let whole = text(&example.ids)?.replace("</s> \n", "</s>\n");
    assert_eq!(whole, "System: Be kind.\nUser: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant: Ciao</s>");
    let answers: Vec<String> =
        example.answers.iter().map(|answer| text(&example.ids[answer.clone()])).collect::<Result<_>>()?;
    assert_eq!(answers.iter().map(|answer| answer.trim_start()).collect::<Vec<_>>(), ["Hello</s>", "Ciao</s>"]);
    Ok(())
}

#[test]
fn a_reply_of_weight_0_is_read_and_not_learned() -> Result<()> {
    let read = |weights: [Value; 2]| -> Result<Examples> {
        let [first, second] = weights;
        let messages = json!([
            {"role": "user", "content": "Hi", "weight": null}, {"role": "assistant", "content": "Hello", "weight": first},
            {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ciao", "weight": second},
        ]);
        Examples::read(&lines(&[json!({"messages": messages})]), &chat(&plain_template("</s>"))?, &stories()?, LIMITS)
    };
    let (all, last) = (read([json!(1), json!(null)])?, read([json!(0), json!(1.0)])?);
    let (all, last) = (&all.list()[0], &last.list()[0]);
    assert_eq!(all.answers.len(), 2);
    assert_eq!((&last.ids, &last.answers[..]), (&all.ids, &all.answers[1..]));
    // Nothing that follows the last learned reply is needed.
    let first = read([json!(1), json!(0)])?;
    assert_eq!(first.list()[0].ids, all.ids[..all.answers[0].end]);
    assert!(error(read([json!(0), json!(0)])).contains("1 left out: nothing to learn from"));
    assert!(error(read([json!(0.5), json!(1)])).contains("message 2 has the `weight` 0.5: it must be 0"));
    Ok(())
}

#[test]
fn what_looks_like_a_special_token_is_text_unless_the_chat_template_writes_it() -> Result<()> {
    let tokenizer = stories()?;
    let end = tokenizer.end_of_answer();
    let ends = |ids: &[u32]| ids.iter().filter(|&&id| id == end).count();
    let question = json!({"question": "Is </s> an end?", "answer": "<s> no </s>"});
    let completion = Examples::read(&lines(&[question]), &gsm8k()?, &tokenizer, LIMITS)?;
    let completion = &completion.list()[0];
    assert_eq!(ends(&completion.ids), 1, "the one that ends the answer");
    // What an evaluation asks is what the model was trained on.
    let asked = tokenizer.text_encoder()?.first("Question: Is </s> an end?\nAnswer: ")?;
    assert_eq!(asked, completion.ids[..completion.answers[0].start]);

    let said = |reply: &str| [Message::new("user", "Is </s> an end?"), Message::new("assistant", reply)];
    let template = ChatTemplate::new(plain_template("</s>"), Vec::new())?;
    let messages = json!({"messages": said("</s>")});
    let conversation = Examples::read(&lines(&[messages]), &chat(&plain_template("</s>"))?, &tokenizer, LIMITS)?;
    let conversation = &conversation.list()[0];
    assert_eq!(ends(&conversation.ids), 1, "the template's own");
    assert_eq!(conversation.answers[0].end, conversation.ids.len());
    let asked = ChatTokenizer::new(&tokenizer)?.ids(&template, &said("")[..1], ReplyOpening::Add)?;
    assert_eq!(asked, conversation.ids[..asked.len()]);
    let unsaid = Examples::read(
        &lines(&[json!({"messages": said("\u{fdd0}")})]),
        &chat(&plain_template("</s>"))?,
        &tokenizer,
        LIMITS,
    );
    assert!(error(unsaid).contains("U+FDD0"));
    Ok(())
}

#[test]
fn records_that_teach_nothing_are_counted_and_wrong_ones_are_named() -> Result<()> {
    let read = |list: &[Value]| Examples::read(&lines(list), &gsm8k()?, &stories()?, LIMITS);
    let good = json!({"question": "1+1?", "answer": "2"});
    let examples = read(&[
        good.clone(),
        json!({"question": "x", "answer": ""}),
        json!({"question": null, "answer": "y"}),
        json!({"question": "x", "answer": null}),
    ])?;
    let counts = examples.counts();
    assert_eq!((examples.list().len(), counts.without_answer, counts.nulls), (1, 1, 2));
    assert!(examples.describe().contains("1 left out: nothing to learn from"), "{}", examples.describe());
    assert!(examples.describe().contains("2 left out: a text is null"), "{}", examples.describe());

    let said = error(read(&[good.clone(), json!({"question": "x", "solution": "y"})]));
    assert!(said.contains("line 2 of x.jsonl") && said.contains("no column `answer`") && said.contains("solution"));
    assert!(error(read(&[good.clone(), json!({"question": "x", "answer": 3})])).contains("`answer` is not a text"));
    assert!(error(read(&[json!({"question": "x", "answer": ""})])).contains("no example"));

    let template = plain_template("</s>");
    let read = |value: Value| Examples::read(&lines(&[value]), &chat(&template)?, &stories()?, LIMITS);
    for (value, said) in [
        (json!({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}), "must alternate"),
        (json!({"messages": [{"role": "assistant", "content": "a"}]}), "message 1 is of \"assistant\""),
        (json!({"messages": [{"role": "user"}]}), "message 1 has no texts"),
        (json!({"messages": [{"role": "user", "content": "a", "weight": 1}]}), "only the assistant's turns"),
        (json!({"messages": "Hi"}), "not a list of messages"),
        (json!({"conversation": []}), "no column `messages`"),
        (json!({"messages": [{"role": "user", "content": "a"}]}), "no example"),
    ] {
        let error = error(read(value.clone()));
        assert!(error.contains(said), "{value}: {error}");
    }
    Ok(())
}

#[test]
fn long_examples_are_refused_left_out_or_cut_as_asked() -> Result<()> {
    let files = local("finetune/gsm8k.jsonl")?;
    let read = |row_length, too_long| {
        Examples::read(&files, &gsm8k()?, &stories()?, ExampleLimits { row_length, too_long, ..LIMITS })
    };
    let whole = read(2000, TooLong::Error)?;
    let lengths: Vec<usize> = whole.list().iter().map(Example::positions).collect();
    let middle = lengths[0];
    let longer = lengths.iter().filter(|&&length| length > middle).count();
    assert!(longer > 0 && longer < 7);
    let said = error(read(middle, TooLong::Error));
    assert!(
        said.contains(&format!("{longer} of the examples are too long")) && said.contains("data.too_long"),
        "{said}"
    );

    let dropped = read(middle, TooLong::Drop)?;
    assert_eq!((dropped.list().len(), dropped.counts().dropped), (8 - longer, longer));
    let cut = read(middle, TooLong::Truncate)?;
    assert_eq!(cut.counts().truncated + cut.counts().without_answer, longer);
    for cut in cut.list().iter().filter(|cut| cut.positions() == middle) {
        let of = |whole: &&Example| whole.ids.starts_with(&cut.ids) && whole.answers[0].start == cut.answers[0].start;
        assert_eq!(whole.list().iter().filter(of).count(), 1, "a cut example is the beginning of a whole one");
    }
    // Shorter than every prompt: nothing of any answer is left.
    assert!(error(read(20, TooLong::Truncate)).contains("8 left out: nothing to learn from"));
    Ok(())
}

#[test]
fn a_template_that_is_wrong_says_what_is_wrong() {
    let parse = |text: &str| Template::parse(text).err().unwrap_or_default();
    assert!(parse("{question}{completion}").contains("{question} is not a place"));
    assert!(parse("{completion}{prompt}").contains("{prompt} once and after it {completion} once"));
    assert!(parse("{prompt}").contains("once"));
    assert!(parse("{prompt}{completion}{completion}").contains("once"));
    assert!(parse("{prompt {completion}").contains("is not a place"));
    assert!(parse("a } {prompt}{completion}").contains("without its partner"));
    let template = Template::parse("{{\"q\": {prompt}}} -> {completion}!").expect("doubled braces are text");
    assert_eq!((template.question("1"), template.answer("2")), ("{\"q\": 1} -> ".into(), "2!".into()));
}

#[test]
fn packed_rows_hold_every_example_once_and_are_nearly_full() {
    let lengths: Vec<usize> = (0..1000).map(|i| 40 + i * 37 % 300).collect();
    let order = Order::Shuffled { seed: 3 }.units(0, lengths.len());
    let rows = pack::rows(&lengths, &order, 512, Packing::Packed);
    let mut seen: Vec<usize> = rows.concat();
    assert!(rows.iter().all(|row| row.iter().map(|&index| lengths[index]).sum::<usize>() <= 512));
    assert_eq!(rows[0][0], order[0]);
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..1000));
    let fill = lengths.iter().sum::<usize>() as f64 / (512 * rows.len()) as f64;
    assert!(fill > 0.97, "{fill}");
    assert_eq!(pack::rows(&lengths, &order, 512, Packing::OneExampleARow).concat(), order);
}

#[test]
fn a_batch_predicts_answers_only_and_places_count_from_each_examples_beginning() -> Result<()> {
    let example = |ids: &[u32], answers: &[(usize, usize)]| Example {
        ids: ids.to_vec(),
        answers: answers.iter().map(|&(start, end)| start..end).collect(),
    };
    let list =
        vec![example(&[1, 2, 3, 4], &[(2, 4)]), example(&[5, 6, 7], &[(1, 2), (2, 3)]), example(&[8, 9], &[(1, 2)])];
    let examples = Examples::new(list, ExampleCounts::default(), &[], 0);
    let batch = examples.batch(&[vec![0, 2], vec![1]]);
    let none = NOT_COUNTED;
    assert_eq!((batch.rows, batch.sequence_length, batch.padding), (2, 4, 2));
    assert_eq!(batch.inputs, [1, 2, 3, 8, 5, 6, 0, 0]);
    assert_eq!(batch.targets, [none, 3, 4, 9, 6, 7, none, none]);
    assert_eq!(batch.places, Some(vec![0, 1, 2, 0, 0, 1, 0, 0]));
    Ok(())
}

#[test]
fn a_stream_taken_up_anywhere_gives_the_batches_of_one_that_never_stopped() -> Result<()> {
    let answers = || std::iter::once(1..2).collect();
    let list = (0..50u32).map(|i| Example { ids: (0..3 + i % 9).collect(), answers: answers() }).collect();
    let examples = Arc::new(Examples::new(list, ExampleCounts::default(), &[], 0));
    for packing in [Packing::Packed, Packing::OneExampleARow] {
        let order = Order::Shuffled { seed: 9 };
        let open = |from: Option<&crate::data::Position>, row_length| {
            ExampleStream::open(Arc::clone(&examples), order, row_length, packing, from)
        };
        let mut stream = open(None, 16)?;
        let mut positions = Vec::new();
        let batches: Vec<Batch> = (0..40)
            .map(|_| {
                positions.push(stream.position());
                stream.next_batch(3)
            })
            .collect();
        assert!(positions[39].epoch >= 1, "epochs follow each other");
        for start in [0, 1, 7, 39] {
            let mut resumed = open(Some(&positions[start]), 16)?;
            assert!(batches[start..].iter().all(|batch| *batch == resumed.next_batch(3)), "{packing:?} {start}");
        }
        assert!(error(open(Some(&positions[1]), 20)).contains("sequence_length was 16 and is 20"));
        let rows = stream.rows_of_epochs(1.0);
        assert!(stream.rows_of_epochs(2.0) >= 2 * rows - 4 && stream.rows_of_epochs(0.5) <= rows / 2 + 1);
    }
    Ok(())
}
