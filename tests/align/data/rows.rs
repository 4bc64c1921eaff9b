//! Rows as files hold them, and errors that name file, line and field.

use burn_peft::PeftError;
use burn_peft::dataset::{
    Conversation, Demonstration, Feedback, JsonLines, Message, Preference, Prompt, Text,
    parse_json_lines,
};
use serde::de::DeserializeOwned;
use serde_json::json;

fn read<T: DeserializeOwned>(row: &str) -> Result<T, String> {
    let rows: Result<Vec<T>, _> = parse_json_lines(row.as_bytes(), "data.jsonl");
    rows.map(|mut rows| rows.remove(0))
        .map_err(|error| error.to_string())
}

fn user(text: &str) -> Message {
    Message::new("user", text)
}

fn assistant(text: &str) -> Message {
    Message::new("assistant", text)
}

#[test]
fn pairs_of_texts_and_of_messages_are_read() {
    let plain: Preference =
        read(r#"{"id": 3, "prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}"#).unwrap();
    let mut expected = Preference::new("p", "c", "r");
    expected.margin = Some(2.0);
    assert_eq!(plain, expected);

    let expected = Preference::new(vec![user("p")], vec![assistant("c")], vec![assistant("r")]);
    for row in [
        // TRL's form, explicit and implicit; ShareGPT's with one message each; UltraFeedback's with the prompt as a text besides.
        json!({"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "content": "r"}], "margin": null}),
        json!({"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}),
        json!({"conversations": [{"from": "human", "value": "p"}], "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"}}),
        json!({"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}),
    ] {
        assert_eq!(
            read::<Preference>(&row.to_string()).unwrap(),
            expected,
            "{row}"
        );
    }
    // Tools come with the row.
    let mut with_tools = expected.clone();
    with_tools.tools = Some(vec![json!({"type": "function"})]);
    let row = serde_json::to_string(&with_tools).unwrap();
    assert_eq!(read::<Preference>(&row).unwrap(), with_tools);
    assert_eq!(with_tools.clone().unpair()[1].tools, with_tools.tools);
    // What is written is read again.
    let row = serde_json::to_string(&expected).unwrap();
    assert_eq!(read::<Preference>(&row).unwrap(), expected);
    let [good, bad] = expected.unpair();
    assert_eq!(
        good,
        Feedback::new(vec![user("p")], vec![assistant("c")], true)
    );
    assert_eq!(
        bad,
        Feedback::new(vec![user("p")], vec![assistant("r")], false)
    );
}

#[test]
fn an_implicit_prompt_is_the_longest_common_beginning() {
    let turns = |last: &str| {
        json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": last}])
    };
    let row = json!({"chosen": turns("x"), "rejected": turns("y")});
    let pair: Preference = read(&row.to_string()).unwrap();
    assert_eq!(pair.prompt.messages().unwrap().len(), 3);
    assert_eq!(pair.rejected, Text::Messages(vec![assistant("y")]));
}

#[test]
fn what_is_no_pair_is_refused_with_its_line_and_field() {
    let say = |role: &str, content: &str| json!({"role": role, "content": content});
    for (row, named) in [
        (
            json!({"chosen": "It is blue", "rejected": "It is black"}),
            "in the middle of a word",
        ),
        (
            json!({"prompt": "p", "chosen": "c"}),
            "missing field `rejected`, or it is null: the row has no keys",
        ),
        (
            json!({"prompt": "p", "chosen": "c", "rejected": 3}),
            "the key `rejected`: expected a text or a list of messages, found a number",
        ),
        (
            json!({"prompt": "p", "chosen": "c", "rejected": [say("assistant", "r")]}),
            "`chosen` is a text and `rejected` is a list",
        ),
        (
            json!({"prompt": [say("user", "p")], "chosen": "c", "rejected": "r"}),
            "`prompt` is a list of messages and `chosen` is a text",
        ),
        (
            json!({"prompt": "q", "chosen": [say("user", "p"), say("assistant", "c")], "rejected": [say("user", "p"), say("assistant", "r")]}),
            "do not begin with it",
        ),
        (
            json!({"chosen": [say("user", "p")], "rejected": [say("user", "q")]}),
            "no first message in common",
        ),
        (
            json!({"chosen": [say("user", "p")], "rejected": [say("user", "p")]}),
            "the same messages",
        ),
        (
            json!({"chosen": [say("user", "p")], "rejected": [say("user", "p"), say("assistant", "r")]}),
            "nothing is left of it",
        ),
        (
            json!({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "much"}),
            "the key `margin`: expected a finite number, found a text",
        ),
        (
            json!({"prompt": [{"role": "user"}], "chosen": "c", "rejected": "r"}),
            "the key `prompt`: message 0: missing field `content`",
        ),
        (
            json!({"prompt": [{"role": "user", "content": null}], "chosen": "c", "rejected": "r"}),
            "`content` is null",
        ),
        (
            json!({"prompt": "p", "conversations": "p", "chosen": "c", "rejected": "r"}),
            "both `prompt` and `conversations`",
        ),
        (json!([1]), "a row, which is a JSON object"),
    ] {
        let good = r#"{"prompt": "p", "chosen": "c", "rejected": "r"}"#;
        let text = format!("{good}\n\n{row}\n");
        let error = parse_json_lines::<Preference>(text.as_bytes(), "data.jsonl").unwrap_err();
        assert!(
            matches!(&error, PeftError::JsonLine { line: 3, .. }),
            "{error}"
        );
        assert!(error.to_string().contains(named), "{named}: {error}");
    }
    let twice =
        read::<Preference>(r#"{"prompt": "p", "prompt": "q", "chosen": "c", "rejected": "r"}"#);
    assert!(twice.unwrap_err().contains("the key `prompt` stands twice"));
}

#[test]
fn judged_answers_demonstrations_and_prompts_are_read() {
    let row: Feedback = read(r#"{"prompt": "p", "completion": "c", "label": 1}"#).unwrap();
    assert_eq!(row, Feedback::new("p", "c", true));
    for (label, named) in [
        ("2", "expected true or false, found 2"),
        ("\"yes\"", "expected true or false"),
        ("null", "missing field `label`"),
    ] {
        let row = format!(r#"{{"prompt": "p", "completion": "c", "label": {label}}}"#);
        let error = read::<Feedback>(&row).unwrap_err();
        assert!(
            error.starts_with("data.jsonl:1: ") && error.contains(named),
            "{error}"
        );
    }
    let row: Demonstration = read(r#"{"prompt": "p", "completion": "c"}"#).unwrap();
    assert_eq!(row.completion.plain(), Some("c"));
    let row: Prompt = read(r#"{"z": [1, 2.5], "prompt": "p", "answer": "42", "a": null}"#).unwrap();
    assert_eq!(row.prompt, Text::from("p"));
    assert_eq!(
        serde_json::to_string(&row.columns).unwrap(),
        r#"{"z":[1,2.5],"answer":"42","a":null}"#
    );
}

#[test]
fn conversations_keep_tools_and_what_templates_read() {
    let row = json!({"messages": [{"role": "user", "content": "w"}, {"role": "assistant", "content": null,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "1", "name": "f"}],
        "tools": [{"type": "function"}]});
    let found: Conversation = read(&row.to_string()).unwrap();
    assert_eq!(found.tools.as_ref().unwrap().len(), 1);
    assert!(found.messages[1].calls_tools() && found.messages[1].content.is_empty());
    assert_eq!(found.messages[2].extra["name"], "f");
    let again: Conversation = read(&serde_json::to_string(&found).unwrap()).unwrap();
    assert_eq!(again, found);
}

#[test]
fn a_stream_yields_the_rows_that_reading_the_whole_does() {
    let text = "\u{feff}{\"prompt\": \"a\"}\r\n\n{\"prompt\": \"b\"}\n{\"prompt\": 1}\n{\"prompt\": \"c\"}";
    let mut rows = JsonLines::<_, Prompt>::new(text.as_bytes(), "data.jsonl");
    let first = rows.next().unwrap().unwrap();
    assert_eq!((first.place.row, first.row), (1, Prompt::new("a")));
    let second = rows.next().unwrap().unwrap();
    assert_eq!(
        (second.place.to_string(), second.row),
        ("data.jsonl:3".into(), Prompt::new("b"))
    );
    let error = rows.next().unwrap().unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("data.jsonl:4: the key `prompt`"),
        "{error}"
    );
    // It ends with the error.
    assert!(rows.next().is_none());

    let mut array = JsonLines::<_, Prompt>::new(&b"[{\"prompt\": \"a\"}]"[..], "data.json");
    let error = array.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("read_json_lines"), "{error}");
    assert!(JsonLines::<_, Prompt>::open("no/such/file").is_err());
}

/// A reader that writes as many rows as wanted, and says how far it was read ahead.
struct Endless<'a>(&'a std::cell::Cell<usize>);

impl std::io::Read for Endless<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let row = b"{\"prompt\": \"p\"}\n";
        out[..row.len()].copy_from_slice(row);
        self.0.set(self.0.get() + 1);
        Ok(row.len())
    }
}

#[test]
fn a_stream_reads_no_further_than_the_row_asked_for() {
    let read = std::cell::Cell::new(0);
    let reader = std::io::BufReader::new(Endless(&read));
    let rows = JsonLines::<_, Prompt>::new(reader, "endless.jsonl");
    assert_eq!(rows.take(1000).filter(|row| row.is_ok()).count(), 1000);
    assert_eq!(read.get(), 1000);
}
