//! Renders conversations by the chat template of a Hugging Face tokenizer, and shows what the assistant says in them.
//!
//! ```text
//! cargo run --release --example chat_template -- --tokenizer DIR --conversations FILE
//! ```
//!
//! With `--check FILE`, `scripts/check_chat_templates.py` compares templates of real models with transformers.

mod args;

use std::error::Error;
use std::process::ExitCode;

use burn_peft::dataset::{ChatFormat, ChatTemplate, Conversation, JsonLines, RenderOptions};
use llama::arguments;
use serde::Deserialize;
use serde_json::{Map, Value};

use args::Args;

fn main() -> ExitCode {
    arguments::exit(run(arguments::parse()))
}

fn run(args: Args) -> Result<(), Box<dyn Error>> {
    if let Some(path) = args.check {
        return check(serde_json::from_str(&std::fs::read_to_string(path)?)?);
    }
    let (Some(tokenizer), Some(conversations)) = (args.tokenizer, args.conversations) else {
        unreachable!("both are required");
    };
    let template = ChatTemplate::from_dir(tokenizer)?;
    for row in JsonLines::<_, Conversation>::open(conversations)? {
        let row = row?;
        let segments = template
            .conversation(&row.row.messages, row.row.tools.as_deref())
            .map_err(|error| error.at_row(&row.place))?;
        for segment in segments {
            let mark = if segment.supervised { '+' } else { ' ' };
            println!("{mark} {:?}", segment.text);
        }
        println!();
    }
    Ok(())
}

#[derive(Deserialize)]
struct Cases {
    tokens: Map<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    source: String,
    messages: Vec<Value>,
    options: Options,
    text: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    #[serde(default)]
    add_generation_prompt: bool,
    tools: Option<Vec<Value>>,
}

/// Compares texts; the exit status is a failure if one differs.
fn check(cases: Cases) -> Result<(), Box<dyn Error>> {
    let (mut same, mut refused, mut other) = (0, 0, 0);
    for case in &cases.cases {
        let options = RenderOptions {
            add_generation_prompt: case.options.add_generation_prompt,
            tools: case.options.tools.clone(),
            ..RenderOptions::new()
        };
        let rendered = ChatTemplate::new(&case.source).and_then(|mut template| {
            for (name, token) in &cases.tokens {
                template = template.with_variable(name, token.clone());
            }
            template.render(&case.messages, &options)
        });
        match (rendered, &case.text) {
            (Ok(found), Some(expected)) if found == *expected => same += 1,
            (Err(_), None) => refused += 1,
            (found, expected) => {
                other += 1;
                println!("{}", case.name);
                match (found, expected) {
                    (Ok(found), Some(expected)) => {
                        let at = found
                            .bytes()
                            .zip(expected.bytes())
                            .take_while(|(a, b)| a == b)
                            .count();
                        let part = |text: &str| {
                            String::from_utf8_lossy(&text.as_bytes()[at..text.len().min(at + 60)])
                                .into_owned()
                        };
                        println!(
                            "  from byte {at}: expected {:?}, found {:?}",
                            part(expected),
                            part(&found)
                        );
                    }
                    (Ok(found), None) => println!(
                        "  expected {:?}, found a text of {} bytes",
                        case.error,
                        found.len()
                    ),
                    (Err(error), _) => println!("  expected a text, found {error}"),
                }
            }
        }
    }
    println!(
        "{same} texts are the same to the byte, {refused} are refused by both, {other} differ"
    );
    match other {
        0 => Ok(()),
        _ => Err("some texts differ from those of transformers".into()),
    }
}
