//! Chat templates against transformers' `apply_chat_template`, on templates with the constructs that those of models have.

use std::path::Path;

use burn_peft::PeftError;
use burn_peft::dataset::{
    ChatFormat, ChatTemplate, Message, Preference, Prompt, RenderOptions, TokenizeConfig,
};
use serde_json::{Value, json};

fn golden() -> (std::path::PathBuf, Value) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/chat_templates");
    let text = std::fs::read_to_string(dir.join("expected.json")).unwrap();
    (dir, serde_json::from_str(&text).unwrap())
}

/// The template with what a case gives it, and the rest as options.
fn prepared(golden: &Value, source: &str, option: &Value) -> (ChatTemplate, RenderOptions) {
    let mut template = ChatTemplate::new(source)
        .unwrap()
        .with_now(golden["now"].as_i64().unwrap());
    for (name, token) in golden["tokens"].as_object().unwrap() {
        template = template.with_special_token(name, token.as_str().unwrap());
    }
    let mut options = RenderOptions::new();
    let list = |value: &Value| value.as_array().unwrap().clone();
    for (name, value) in option.as_object().unwrap() {
        match name.as_str() {
            "add_generation_prompt" => options.add_generation_prompt = value.as_bool().unwrap(),
            "continue_final_message" => options.continue_final_message = value.as_bool().unwrap(),
            "tools" => options.tools = Some(list(value)),
            "documents" => options.documents = Some(list(value)),
            _ => template = template.with_variable(name, value.clone()),
        }
    }
    (template, options)
}

#[test]
fn every_text_is_that_of_transformers_to_the_byte() {
    let (dir, golden) = golden();
    let mut differences = Vec::new();
    let (mut texts, mut errors, mut spans) = (0, 0, 0);
    for case in golden["cases"].as_array().unwrap() {
        let name = |key: &str| case[key].as_str().unwrap();
        let path = dir
            .join("templates")
            .join(name("template"))
            .with_extension("jinja");
        let source = std::fs::read_to_string(path).unwrap();
        let (template, options) = prepared(&golden, &source, &golden["options"][name("option")]);
        let messages = golden["conversations"][name("conversation")]
            .as_array()
            .unwrap();
        let rendered = template.render(messages, &options);
        let place = format!(
            "{} {} {}",
            name("template"),
            name("conversation"),
            name("option")
        );
        match (&rendered, case["text"].as_str()) {
            (Ok(found), Some(expected)) => {
                texts += 1;
                for (found, expected) in found.split('\n').zip(expected.split('\n')) {
                    if found != expected {
                        differences.push(format!(
                            "{place}:\n  expected {expected:?}\n  found    {found:?}"
                        ));
                    }
                }
                if found.split('\n').count() != expected.split('\n').count() {
                    differences.push(format!("{place}: other lines"));
                }
            }
            (Err(error), Some(_)) => differences.push(format!("{place}: {error}")),
            (Ok(text), None) => differences.push(format!(
                "{place}: expected {}, found {text:?}",
                case["error"]
            )),
            (Err(error), None) => {
                errors += 1;
                let message = case["message"].as_str().unwrap_or_default();
                if !error.to_string().contains(message) {
                    differences.push(format!("{place}: expected {message:?}, found {error}"));
                }
            }
        }
        if let Some(expected) = case.get("spans") {
            spans += 1;
            let (_, found) = template.render_spans(messages, &options).unwrap();
            let found: Vec<_> = found.iter().map(|span| [span.start, span.end]).collect();
            if json!(found) != *expected {
                differences.push(format!(
                    "{place}: expected the spans {expected}, found {found:?}"
                ));
            }
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    // The file has what it should, so that none of this passes for want of cases.
    assert!(
        texts > 400 && errors > 40 && spans > 40,
        "{texts} texts, {errors} errors, {spans} spans"
    );
}

fn talk() -> [Message; 4] {
    [
        Message::new("user", "One?"),
        Message::new("assistant", "1"),
        Message::new("user", "Two?"),
        Message::new("assistant", "2"),
    ]
}

fn template(name: &str) -> ChatTemplate {
    let (dir, golden) = golden();
    let source = std::fs::read_to_string(dir.join("templates").join(name)).unwrap();
    prepared(&golden, &source, &json!({})).0
}

fn supervised(template: &ChatTemplate, messages: &[Message]) -> Vec<String> {
    let segments = template.conversation(messages, None).unwrap();
    let texts = segments.iter().filter(|segment| segment.supervised);
    texts.map(|segment| segment.text.clone()).collect()
}

#[test]
fn spans_without_marks_are_those_with_marks() {
    // The template ends a turn by a token that it is told here.
    let plain = template("chatml.jinja").with_special_token("eos_token", "<|im_end|>");
    assert!(!plain.has_generation_marks());
    assert_eq!(supervised(&plain, &talk()), ["1<|im_end|>", "2<|im_end|>"]);
    let marked = template("marks_tight.jinja");
    assert!(marked.has_generation_marks());
    assert_eq!(supervised(&marked, &talk()), ["1<|im_end|>", "2<|im_end|>"]);
    // All segments make the text.
    let text: String = plain
        .conversation(&talk(), None)
        .unwrap()
        .into_iter()
        .map(|s| s.text)
        .collect();
    assert_eq!(text, plain.render(&talk(), &RenderOptions::new()).unwrap());
    // A prompt and its answer are the whole.
    let (prompt, answer) = plain.answered(&talk()[..3], &talk()[3..], None).unwrap();
    assert_eq!(prompt, plain.prompt(&talk()[..3], None).unwrap());
    assert_eq!(
        prompt + &answer.iter().map(|s| s.text.as_str()).collect::<String>(),
        text
    );
}

#[test]
fn turns_that_change_when_others_follow_have_no_spans() {
    // The template leaves out the thoughts of turns before the last question.
    let template = template("thinking.jinja");
    let thought =
        |text: &str| Message::new("assistant", format!("<think>\nhm\n</think>\n\n{text}"));
    let [ask, _, again, _] = talk();
    let error = template
        .conversation(&[ask, thought("1"), again, thought("2")], None)
        .unwrap_err();
    assert!(matches!(error, PeftError::ChatTemplate { .. }));
    assert!(
        error.to_string().contains("message 1") && error.to_string().contains("{% generation %}"),
        "{error}"
    );
}

#[test]
fn templates_that_fail_or_do_not_end_are_errors() {
    let fails = |source: &str| {
        let result = ChatTemplate::new(source)
            .and_then(|template| template.render(&talk(), &RenderOptions::new()));
        result.unwrap_err().to_string()
    };
    for (source, named) in [
        ("\n{% for m in messages %}", "line 2"),
        (
            "{{ raise_exception('no such role') }}",
            "line 1: the template refuses the messages: no such role",
        ),
        ("{{ messages[9].content.text }}", "line 1"),
        ("{{ messages.append(1) }}", "would change"),
        (
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            "does not end within the steps allowed",
        ),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "recursion",
        ),
        (
            "{% set ns = namespace(t='x') %}{% for i in range(99999) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
            "does not end",
        ),
        ("{{ 'x' * 999999999999 }}", "does not end"),
        ("{{ strftime_now('%~') }}", "strftime_now"),
    ] {
        let error = fails(source);
        assert!(
            error.starts_with("chat_template: ") && error.contains(named),
            "{source}: {error}"
        );
    }
    let none = ChatTemplate::new("x")
        .unwrap()
        .render::<Message>(&[], &RenderOptions::new());
    assert!(none.unwrap_err().to_string().contains("no messages"));
    let many = ChatTemplate::new("{% for i in range(9999) %}{{ i }}{% endfor %}").unwrap();
    assert!(many.render(&talk(), &RenderOptions::new()).is_ok());
    assert!(
        many.with_fuel(10)
            .render(&talk(), &RenderOptions::new())
            .is_err()
    );
}

#[test]
fn a_tokenizers_directory_gives_template_and_tokens() {
    let dir = tempfile::TempDir::new().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let text = |template: &ChatTemplate| {
        template
            .render(&talk()[..1], &RenderOptions::new())
            .unwrap()
    };
    let error = ChatTemplate::from_dir(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("tokenizer_config.json") && error.contains("chat_template.jinja"),
        "{error}"
    );
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": null, "chat_template": [
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"},
            {"name": "tool_use", "template": "tools"}]}"#,
    );
    assert_eq!(
        text(&ChatTemplate::from_dir(dir.path()).unwrap()),
        "<s>One?"
    );
    assert_eq!(
        text(&ChatTemplate::named_from_dir(dir.path(), "tool_use").unwrap()),
        "tools"
    );
    let error = ChatTemplate::named_from_dir(dir.path(), "rag")
        .unwrap_err()
        .to_string();
    assert!(error.contains("found default, tool_use"), "{error}");
    write("special_tokens_map.json", r#"{"eos_token": "</s>"}"#);
    assert_eq!(
        text(&ChatTemplate::from_dir(dir.path()).unwrap()),
        "<s>One?</s>"
    );
    // A file of its own comes first.
    write("chat_template.jinja", "{{ messages[0].role }}");
    assert_eq!(text(&ChatTemplate::from_dir(dir.path()).unwrap()), "user");
    write("chat_template.jinja", "{% if %}");
    let error = ChatTemplate::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja: line 1"), "{error}");
    write("tokenizer_config.json", "{");
    assert!(matches!(
        ChatTemplate::from_dir(dir.path()),
        Err(PeftError::Malformed { .. })
    ));
}

/// Line ends of Windows, in a template that a checkout changed, change nothing.
#[test]
fn line_ends_of_a_template_are_those_of_unix() {
    let source = "{% if true %}\na\n{{- 'b\nc' }}\n{% endif %}\nd\n";
    let render = |source: &str| {
        ChatTemplate::new(source)
            .unwrap()
            .render(&talk(), &RenderOptions::new())
    };
    let expected = render(source).unwrap();
    assert_eq!(expected, "ab\nc\nd");
    assert_eq!(render(&source.replace('\n', "\r\n")).unwrap(), expected);
    assert_eq!(render(&source.replace('\n', "\r")).unwrap(), expected);
}

#[test]
fn tools_of_a_row_stand_in_its_prompt() {
    let template = ChatTemplate::new(
        "{{ tools | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    .unwrap();
    let [ask, answer, ..] = talk();
    let mut row = Preference::new(
        vec![ask.clone()],
        vec![answer],
        vec![Message::new("assistant", "3")],
    );
    row.tools = Some(vec![json!({"type": "function"}), json!({})]);
    let pair = TokenizeConfig::new()
        .tokenize_preference(&row, &template, super::bytes)
        .unwrap();
    let text = |tokens: &[u32]| {
        tokens
            .iter()
            .map(|&token| token as u8 as char)
            .collect::<String>()
    };
    assert_eq!(text(pair.prompt()), "2<user>One?<assistant>");
    assert_eq!(
        [
            text(pair.chosen().response()),
            text(pair.rejected().response())
        ],
        ["1", "3"]
    );
    let mut prompt = Prompt::new(vec![ask]);
    prompt.columns.insert("tools".into(), json!([{}, {}]));
    let tokens = TokenizeConfig::new()
        .tokenize_prompt(&prompt, &template, super::bytes)
        .unwrap();
    assert_eq!(tokens, pair.prompt());
}
