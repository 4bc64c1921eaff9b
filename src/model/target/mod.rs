//! Which modules of a model get an adapter, and with what rank and alpha, by PEFT's rules.
//!
//! For a module path such as `model.layers.3.self_attn.q_proj`:
//!
//! 1. A path that `exclude_modules` names is out, whatever else names it.
//! 2. `target_modules` decides: a *list* by equality or by suffix after a dot (`q_proj` is no `xq_proj`), a *string*
//!    as a regular expression over the whole path, `"all-linear"` as every linear module but the output head.
//! 3. A path that a list matched by suffix (not by equality) must also lie in one of `layers_to_transform`, where that
//!    is given. Its layer is the first numbered segment after any dotted name, or after one of `layers_pattern`.
//! 4. Its rank is that of the first key of `rank_pattern`, in the order of the file, for which `^(.*\.)?(KEY)$`
//!    matches, otherwise the default; likewise its alpha.
//!
//! These are the rules of `check_target_module_exists` and `get_pattern_key` in
//! [PEFT 0.21](https://github.com/huggingface/peft); `tests/targets.rs` compares the answers with PEFT's own.
//! `modules_to_save`, which also excludes in PEFT, is not part of this configuration.

mod budget;
mod condense;
mod config;
mod keys;
mod layer_filter;
mod listed;
mod matcher;
mod name_list;
mod nearest;
mod pattern;
mod pattern_map;
mod plain_name;
mod report;
mod unmatched;

pub(super) use condense::{condensed, ends};
pub use config::{ModuleNames, TargetConfig, TargetModules};
pub(crate) use listed::Adapted;
pub use matcher::TargetMatcher;
pub use pattern_map::PatternMap;
pub use report::{TargetMatch, TargetReport};
pub use unmatched::UnmatchedPattern;
pub(crate) use unmatched::unmatched;
