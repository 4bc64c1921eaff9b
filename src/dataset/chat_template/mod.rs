//! Chat templates of Hugging Face's tokenizers, rendered as `apply_chat_template` of transformers renders them.
//!
//! A template is a program in [Jinja](https://jinja.palletsprojects.com) that comes with the model's tokenizer, in
//! `tokenizer_config.json` or a file of its own. [minijinja](https://docs.rs/minijinja) runs it; what it leaves out of Python is here.
//!
//! ```
//! # fn main() -> burn_peft::Result<()> {
//! use burn_peft::dataset::{ChatFormat, ChatTemplate, Message};
//!
//! let template = ChatTemplate::new(
//!     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}\
//!      {% if add_generation_prompt %}<assistant>{% endif %}",
//! )?
//! .with_special_token("eos_token", "</s>");
//! let messages = [Message::new("user", "1+1?"), Message::new("assistant", "2")];
//! assert_eq!(template.prompt(&messages[..1], None)?, "<user>1+1?</s><assistant>");
//! // Where the template has no marks, what the assistant says is found by rendering the turns before it.
//! let segments = template.conversation(&messages, None)?;
//! assert_eq!((segments[1].text.as_str(), segments[1].supervised), ("2</s>", true));
//! # Ok(())
//! # }
//! ```

mod files;
mod json;
mod ordered;
mod python;
mod render;
mod spans;

use std::fmt;

use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use serde_json::{Map, Value};

use crate::{PeftError, Result};

/// The steps that a rendering may take, besides those for the size of its input.
const FUEL: u64 = 10_000_000;

/// A compiled chat template with the special tokens that it may write.
#[derive(Clone)]
pub struct ChatTemplate {
    name: String,
    source: String,
    environment: Environment<'static>,
    variables: Map<String, Value>,
    marked: bool,
    fuel: u64,
}

/// What is rendered besides the messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RenderOptions {
    /// Whether to end with the head of the assistant's next turn. Default: no.
    pub add_generation_prompt: bool,
    /// Whether to end in the last message, so that the model goes on with it. Default: no.
    pub continue_final_message: bool,
    /// Descriptions of the tools that the model may call. Default: none.
    pub tools: Option<Vec<Value>>,
    /// Documents to answer from. Default: none.
    pub documents: Option<Vec<Value>>,
}

impl RenderOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends with the head of the assistant's next turn.
    pub fn with_generation_prompt(mut self, add: bool) -> Self {
        self.add_generation_prompt = add;
        self
    }

    /// Ends in the last message.
    pub fn with_continued_message(mut self, continued: bool) -> Self {
        self.continue_final_message = continued;
        self
    }

    /// Describes tools.
    pub fn with_tools(mut self, tools: Vec<Value>) -> Self {
        self.tools = Some(tools);
        self
    }

    /// Gives documents.
    pub fn with_documents(mut self, documents: Vec<Value>) -> Self {
        self.documents = Some(documents);
        self
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("name", &self.name)
            .field("source", &self.source)
            .field("variables", &self.variables)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    ///
    /// [`PeftError::ChatTemplate`] names the line that is no template.
    pub fn new(source: &str) -> Result<Self> {
        Self::compile("chat_template", source)
    }

    /// Compiles a template that errors call `name`.
    fn compile(name: &str, source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .expect("blocks are only trimmed"),
        );
        minijinja_contrib::add_to_environment(&mut environment);
        python::add_to(&mut environment);
        ordered::add_to(&mut environment);
        // Every line of a template ends as on Unix.
        let source = &source.replace("\r\n", "\n").replace('\r', "\n");
        let (program, marked) = spans::with_filters(&ordered::with_calls(source));
        spans::add_to(&mut environment);
        environment
            .add_template_owned(TEMPLATE, program)
            .map_err(|error| failed(name, &error))?;
        Ok(Self {
            name: name.into(),
            source: source.into(),
            environment,
            variables: Map::new(),
            marked,
            fuel: FUEL,
        })
    }

    /// Sets a special token, such as `bos_token` and `eos_token`, which templates write by these names.
    pub fn with_special_token(self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.with_variable(name, text.into())
    }

    /// Sets a variable of the template, such as `enable_thinking`.
    pub fn with_variable(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }

    /// Allows a rendering `fuel` steps, where a step is an instruction or 64 bytes written. Default: 10 million. The input allows 16
    /// steps a byte more.
    pub fn with_fuel(mut self, fuel: u64) -> Self {
        self.fuel = fuel;
        self
    }

    /// Fixes the time that `strftime_now` shows, in seconds since 1970 UTC. Default: the time of the rendering, in UTC. Fix it for data
    /// that is the same on every day.
    pub fn with_now(mut self, seconds: i64) -> Self {
        python::set_now(&mut self.environment, seconds);
        self
    }

    /// The template as it was read, with the line ends of Unix.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template marks what the assistant says, by `{% generation %}`.
    pub fn has_generation_marks(&self) -> bool {
        self.marked
    }
}

/// The name of the template in its environment.
const TEMPLATE: &str = "chat_template";

/// An error of the template, with its line.
fn failed(name: &str, error: &minijinja::Error) -> PeftError {
    let mut reason = String::new();
    if let Some(line) = error.line() {
        reason += &format!("line {line}: ");
    }
    reason += &match (error.kind(), error.detail()) {
        (minijinja::ErrorKind::OutOfFuel, _) => {
            "it does not end within the steps allowed: it loops, or writes without end. `ChatTemplate::with_fuel` allows more".into()
        }
        (minijinja::ErrorKind::InvalidOperation, Some(detail)) => detail.into(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    PeftError::ChatTemplate {
        name: name.into(),
        reason,
    }
}
