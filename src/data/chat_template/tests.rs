//! Chat templates beside transformers' apply_chat_template.

use super::*;
use std::path::PathBuf;
use std::process::Command;

/// One conversation rendered by transformers; `expected` is null where its template refuses it.
#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    special_tokens: serde_json::Map<String, serde_json::Value>,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    expected: Option<String>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates")
}

/// Renders every case; how many there are.
fn check(json: &str) -> Result<usize> {
    let cases: Vec<Case> = serde_json::from_str(json)?;
    for case in &cases {
        let tokens = case.special_tokens.iter().filter_map(|(name, token)| Some((name.clone(), token_text(token)?)));
        let template = ChatTemplate::new(&case.template, tokens.collect()).with_context(|| case.name.clone())?;
        let opening = if case.add_generation_prompt { ReplyOpening::Add } else { ReplyOpening::Omit };
        let rendered = template.render(&case.messages, opening);
        let roles: Vec<&str> = case.messages.iter().map(|message| message.role.as_str()).collect();
        match &case.expected {
            Some(expected) => assert_eq!(rendered?, *expected, "{} {roles:?} {opening:?}", case.name),
            None => assert!(rendered.is_err(), "{} {roles:?} renders {rendered:?}", case.name),
        }
    }
    Ok(cases.len())
}

#[test]
fn conversations_are_rendered_as_transformers_renders_them() -> Result<()> {
    let cases = check(&std::fs::read_to_string(fixtures().join("cases.json"))?)?;
    assert!(cases >= 40, "{cases} cases");
    Ok(())
}

/// A folder of published templates (*.jinja) in VRTRAIN_CHAT_TEMPLATES, rendered by transformers in VRTRAIN_PYTHON.
#[test]
fn published_templates_are_rendered_as_transformers_renders_them() -> Result<()> {
    let (Some(folder), Some(python)) = (std::env::var_os("VRTRAIN_CHAT_TEMPLATES"), std::env::var_os("VRTRAIN_PYTHON"))
    else {
        println!("skipped: VRTRAIN_CHAT_TEMPLATES or VRTRAIN_PYTHON is not set");
        return Ok(());
    };
    let output = Command::new(python).arg(fixtures().join("make.py")).arg(folder).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let cases = check(std::str::from_utf8(&output.stdout)?)?;
    assert!(cases > 0, "the folder has no *.jinja");
    println!("{cases} cases");
    Ok(())
}

#[test]
fn a_folder_gives_its_template_and_its_tokens() -> Result<()> {
    let folder = tempfile::tempdir()?;
    assert!(ChatTemplate::load(folder.path())?.is_none());
    let conversation = [Message::new("user", "Hi")];
    let render = |config: &str| -> Result<String> {
        std::fs::write(folder.path().join("tokenizer_config.json"), config)?;
        ChatTemplate::load(folder.path())?.context("a template")?.render(&conversation, ReplyOpening::Omit)
    };
    let source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
    let single = format!(r#"{{"chat_template": "{source}", "bos_token": {{"content": "<s>"}}, "eos_token": "</s>"}}"#);
    assert_eq!(render(&single)?, "<s>Hi</s>");
    let listed =
        r#"{"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
    assert_eq!(render(listed)?, "yes");
    std::fs::write(folder.path().join("chat_template.jinja"), "own file {{ messages|length }}\n")?;
    assert_eq!(render(&single)?, "own file 1");
    std::fs::remove_file(folder.path().join("chat_template.jinja"))?;
    std::fs::write(folder.path().join("special_tokens_map.json"), r#"{"eos_token": "<end>"}"#)?;
    assert_eq!(render(&format!(r#"{{"chat_template": "{source}"}}"#))?, "Hi<end>");

    for (config, said) in [
        ("[", "is not JSON"),
        (r#"{"chat_template": 3}"#, "neither a text nor a list"),
        (r#"{"chat_template": [{"name": "x", "template": "y"}]}"#, "named \"default\""),
        (r#"{"chat_template": "{% for %}"}"#, "the chat template in"),
        (r#"{"chat_template": "{{ raise_exception('roles must alternate') }}"}"#, "roles must alternate"),
        (
            r#"{"chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"}"#,
            "fuel",
        ),
    ] {
        let error = render(config).err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert!(error.contains(said), "{config}: {error}");
    }
    Ok(())
}

#[test]
fn a_template_may_ask_for_the_date() -> Result<()> {
    let template = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}", Vec::new())?;
    let date = template.render(&[], ReplyOpening::Omit)?;
    assert!(date.len() == 11 && date[7..].parse::<u16>()? >= 2024, "{date}");
    assert!(template.asks_for_the_date());
    let day = template.on(jiff::civil::date(2026, 1, 31))?;
    assert_eq!(day.render(&[], ReplyOpening::Omit)?, "31 Jan 2026");
    assert!(!ChatTemplate::new("{{ messages }}", Vec::new())?.asks_for_the_date());
    Ok(())
}
