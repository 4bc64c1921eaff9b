//! The command line.

use std::path::PathBuf;

use clap::Parser;
use llama::arguments;

/// Renders conversations by the chat template of a Hugging Face tokenizer, and shows what the assistant says in them.
#[derive(Parser, Clone, Debug)]
pub struct Args {
    /// The folder with `tokenizer_config.json`.
    #[arg(long, required_unless_present = "check", value_parser = arguments::directory())]
    pub tokenizer: Option<PathBuf>,
    /// Conversations, one a line, with the key `messages`.
    #[arg(long, required_unless_present = "check", value_parser = arguments::file())]
    pub conversations: Option<PathBuf>,
    /// Cases with the texts that transformers makes, as `scripts/check_chat_templates.py` writes them.
    #[arg(long, value_parser = arguments::file())]
    pub check: Option<PathBuf>,
}
