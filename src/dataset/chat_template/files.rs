//! Templates as the files of a tokenizer hold them.

use std::path::Path;

use serde_json::{Map, Value};

use super::ChatTemplate;
use crate::{PeftError, Result};

/// The most bytes of one of these files.
const MAX_BYTES: u64 = 64 << 20;
/// The special tokens that templates see, as transformers names them.
const TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl ChatTemplate {
    /// Reads the template of a tokenizer's directory: `chat_template.jinja` if it is there, else `chat_template` of
    /// `tokenizer_config.json`. Where that is a list of named templates, the one called `default`. Special tokens are those of
    /// `tokenizer_config.json`, and those of `special_tokens_map.json` that are not there.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`] when a file cannot be read, [`PeftError::Malformed`] when it is not what its name says or has no template, and
    /// as [`new`](Self::new).
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        Self::named_from_dir(dir, "default")
    }

    /// As [`from_dir`](Self::from_dir), for the template called `name`, for instance `tool_use`: `additional_chat_templates/NAME.jinja`,
    /// or an entry of the list in `tokenizer_config.json`.
    ///
    /// # Errors
    ///
    /// As [`from_dir`](Self::from_dir).
    pub fn named_from_dir(dir: impl AsRef<Path>, name: &str) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer_config.json");
        let config = object(&path)?.unwrap_or_default();
        let file = match name {
            "default" => dir.join("chat_template.jinja"),
            _ => dir
                .join("additional_chat_templates")
                .join(format!("{name}.jinja")),
        };
        let mut template = match read(&file)? {
            Some(source) => Self::compile(&file.display().to_string(), &source)?,
            None => {
                let source = source(&config, name).map_err(|reason| PeftError::Malformed {
                    path: path.clone(),
                    reason,
                })?;
                Self::compile(&path.display().to_string(), source)?
            }
        };
        let map = object(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        for token in TOKENS {
            let text = [&config, &map]
                .into_iter()
                .find_map(|object| text_of(object.get(token)?));
            if let Some(text) = text {
                template = template.with_special_token(token, text);
            }
        }
        Ok(template)
    }
}

/// The template called `name` in a configuration.
fn source<'c>(config: &'c Map<String, Value>, name: &str) -> Result<&'c str, String> {
    let known = match config.get("chat_template") {
        Some(Value::String(source)) if name == "default" => return Ok(source),
        Some(Value::Array(named)) => named,
        _ => {
            return Err(format!(
                "expected a text or a list under `chat_template` with the template `{name}`, or a file `chat_template.jinja` beside it: a base \
                 model's tokenizer often has none, that of the model tuned for chats has"
            ));
        }
    };
    let field = |entry: &'c Value, key| entry.get(key).and_then(Value::as_str);
    let found = known
        .iter()
        .find(|entry| field(entry, "name") == Some(name));
    found
        .and_then(|entry| field(entry, "template"))
        .ok_or_else(|| {
            let names: Vec<_> = known
                .iter()
                .filter_map(|entry| field(entry, "name"))
                .collect();
            format!(
                "expected a template called `{name}` under `chat_template`, found {}",
                names.join(", ")
            )
        })
}

/// A token, which stands as a text or as an object with its `content`.
fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let Some(text) = read(path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| PeftError::Malformed {
            path: path.into(),
            reason: format!("expected a JSON object: {error}"),
        })
}

/// The text of a file, if there is one.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(PeftError::io(path)(error)),
        Ok(found) if found.len() > MAX_BYTES => {
            return Err(PeftError::Malformed {
                path: path.into(),
                reason: format!("expected at most {MAX_BYTES} bytes, found {}", found.len()),
            });
        }
        Ok(_) => {}
    }
    std::fs::read_to_string(path)
        .map(Some)
        .map_err(PeftError::io(path))
}
