//! Where adapters lie, and why there is none where one was looked for.

use std::fs;
use std::path::{Path, PathBuf};

use super::base::{BASE_FILE, BASE_INDEX_FILE};
use super::config::CONFIG_FILE;
use super::mlx::MLX_WEIGHTS_FILE;
use super::read::{PICKLE_FILE, WEIGHTS_FILE};
use crate::model::{DEFAULT_ADAPTER, check_adapter_name};
use crate::{PeftError, Result};

/// Most folders that a message names.
const MOST_NAMED: usize = 8;

/// The directory of the adapter `name`: `dir` itself, or its folder of that name, where
/// [`save_adapter`](crate::model::PeftModel::save_adapter) puts it. The folder is preferred, if both hold an adapter.
pub(super) fn folder_of(dir: &Path, name: &str) -> PathBuf {
    let is_folder = name != DEFAULT_ADAPTER && check_adapter_name(name).is_ok();
    let folder = dir.join(name);
    match is_folder && folder.join(CONFIG_FILE).is_file() {
        true => folder,
        false => dir.to_owned(),
    }
}

/// Says what there is in `dir`, which has no configuration of an adapter.
///
/// # Errors
///
/// [`PeftError::Malformed`] where something tells what was meant.
pub(super) fn explain_absence(dir: &Path) -> Result<()> {
    let error = |reason: String| {
        Err(PeftError::Malformed {
            path: dir.to_owned(),
            reason,
        })
    };
    if dir.is_file() {
        return error(format!(
            "a file; an adapter is given by the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        ));
    }
    if !dir.exists() {
        return error(format!(
            "not there; an adapter is given by the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        ));
    }
    let folders = folders_with_adapters(dir);
    if !folders.is_empty() {
        let shown: Vec<_> = folders
            .iter()
            .take(MOST_NAMED)
            .map(|name| format!("`{name}`"))
            .collect();
        let more = match folders.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let what = match folders.iter().all(|name| name.starts_with("checkpoint-")) {
            true => "the output of a training run, whose checkpoints are adapters",
            false => "no adapter, but a directory of adapters",
        };
        return error(format!(
            "{what}: load one of its folders {}{more}",
            shown.join(", ")
        ));
    }
    let holds = |name: &str| dir.join(name).exists();
    if !holds(WEIGHTS_FILE) && !holds(PICKLE_FILE) && (holds(BASE_FILE) || holds(BASE_INDEX_FILE)) {
        return error(format!(
            "a base model and no adapter: there is no {CONFIG_FILE}; `load_base` loads it"
        ));
    }
    Ok(())
}

/// The names of the folders in `dir` that hold an adapter, those of checkpoints by their numbers.
fn folders_with_adapters(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut folders: Vec<String> = entries
        .filter(|entry| entry.path().join(CONFIG_FILE).is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let number = |name: &str| name.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    folders.sort_by(|a, b| (number(a), a).cmp(&(number(b), b)));
    folders
}

/// Says what there is in `dir` in place of the file of tensors.
///
/// # Errors
///
/// [`PeftError::Malformed`] where something tells what was meant.
pub(super) fn explain_no_weights(dir: &Path) -> Result<()> {
    let pickle = dir.join(PICKLE_FILE);
    if pickle.exists() {
        return Err(PeftError::Malformed {
            path: pickle,
            reason: format!(
                "a pickle, which is never read, as it can run any program. Convert it in Python, if you trust it: \
                 `safetensors.torch.save_file(torch.load(\"{PICKLE_FILE}\", map_location=\"cpu\", weights_only=True), \
                 \"{WEIGHTS_FILE}\", metadata={{\"format\": \"pt\"}})`"
            ),
        });
    }
    let folders = folders_with_adapters(dir);
    if let Some(last) = folders.iter().rfind(|name| name.starts_with("checkpoint-")) {
        return Err(PeftError::Malformed {
            path: dir.join(WEIGHTS_FILE),
            reason: format!(
                "not there; the directory is the output of a training run, whose last checkpoint is `{last}`: load that folder"
            ),
        });
    }
    Ok(())
}

/// What makes a directory that holds files of an adapter's names none that saving may replace, or `None` if it holds an adapter of
/// this method, or nothing.
pub(super) fn not_replaceable(dir: &Path) -> Option<(PathBuf, String)> {
    let (config, weights) = (dir.join(CONFIG_FILE), dir.join(WEIGHTS_FILE));
    let is_there = |path: &Path| path.symlink_metadata().is_ok();
    if !is_there(&config) {
        return is_there(&weights).then(|| {
            let reason = format!("there without {CONFIG_FILE}, so it may be no adapter");
            (weights, reason)
        });
    }
    if dir.join(MLX_WEIGHTS_FILE).exists() && !is_there(&weights) {
        return Some((config, "an adapter of mlx-lm".into()));
    }
    let bytes = match super::read::read_bounded(&config, super::config::MAX_CONFIG_BYTES) {
        Ok(bytes) => bytes,
        Err(error) => return Some((config, error.to_string())),
    };
    let method = serde_json::from_slice::<serde_json::Value>(&bytes);
    match method.as_ref().map(|config| config["peft_type"].as_str()) {
        Ok(Some("LORA")) => None,
        Ok(Some(other)) => Some((config, format!("an adapter of another method, {other:?}"))),
        _ => Some((config, "no configuration of PEFT".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter_in(dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(CONFIG_FILE), r#"{"peft_type": "LORA"}"#).unwrap();
        fs::write(dir.join(WEIGHTS_FILE), "").unwrap();
    }

    #[test]
    fn a_name_finds_its_folder_or_the_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        adapter_in(&dir.join("x"));
        assert_eq!(folder_of(dir, "x"), dir.join("x"));
        assert_eq!(folder_of(&dir.join("x"), "x"), dir.join("x"));
        assert_eq!(folder_of(dir, "y"), dir);
        assert_eq!(folder_of(dir, "default"), dir);
        assert_eq!(folder_of(&dir.join("x"), "../x"), dir.join("x"));
    }

    #[test]
    fn what_is_there_is_explained() {
        let reason = |fill: &dyn Fn(&Path)| {
            let scratch = tempfile::tempdir().unwrap();
            fill(scratch.path());
            let explained = explain_absence(scratch.path());
            explained.map_err(|error| error.to_string()).err()
        };
        assert_eq!(reason(&|_| {}), None);
        let text = reason(&|dir| {
            for step in [1000, 20, 3] {
                adapter_in(&dir.join(format!("checkpoint-{step}")));
            }
        });
        let text = text.unwrap();
        assert!(text.contains("training run"), "{text}");
        assert!(
            text.contains("`checkpoint-3`, `checkpoint-20`, `checkpoint-1000`"),
            "{text}"
        );
        let text = reason(&|dir| adapter_in(&dir.join("sql"))).unwrap();
        assert!(
            text.contains("a directory of adapters: load one of its folders `sql`"),
            "{text}"
        );
        let text = reason(&|dir| fs::write(dir.join(BASE_FILE), "").unwrap()).unwrap();
        assert!(text.contains("a base model and no adapter"), "{text}");

        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join(PICKLE_FILE), "").unwrap();
        let text = explain_no_weights(scratch.path()).unwrap_err().to_string();
        assert!(text.contains("save_file(torch.load("), "{text}");
    }

    #[test]
    fn only_an_adapter_of_this_method_may_be_replaced() {
        let of = |files: &[(&str, &str)]| {
            let scratch = tempfile::tempdir().unwrap();
            for (name, text) in files {
                fs::write(scratch.path().join(name), text).unwrap();
            }
            not_replaceable(scratch.path()).map(|(_, reason)| reason)
        };
        let lora = r#"{"peft_type": "LORA"}"#;
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("notes.txt", "")]), None);
        assert_eq!(of(&[(CONFIG_FILE, lora), (WEIGHTS_FILE, "")]), None);
        assert_eq!(of(&[(CONFIG_FILE, lora)]), None);
        for (files, part) in [
            (&[(WEIGHTS_FILE, "")][..], "there without"),
            (&[(CONFIG_FILE, r#"{"peft_type": "IA3"}"#)], "\"IA3\""),
            (&[(CONFIG_FILE, "{}")], "no configuration of PEFT"),
            (&[(CONFIG_FILE, "not JSON")], "no configuration of PEFT"),
            (&[(CONFIG_FILE, "{}"), (MLX_WEIGHTS_FILE, "")], "mlx-lm"),
        ] {
            let reason = of(files).unwrap();
            assert!(reason.contains(part), "{reason}");
        }
    }
}
