//! Instruction data for fine-tuning: from a JSON lines file to padded batches that say which tokens are learned.
//!
//! ```text
//! JSON lines ─read─> Instruction ─render─> [Segment] ─tokenize─> Example ─collate─> Batch ─> sft_loss
//! ```
//!
//! Files are read as people have them: JSON lines or one JSON array, triples of other keys ([`InstructionKeys`]), conversations of
//! OpenAI's and of ShareGPT's form ([`Conversation`]). What is none of these is an error that names the line and what to do.
//!
//! Every [`Segment`] of a rendered prompt says whether it is supervised, and each is tokenised on its own, so that the
//! mask of learned tokens follows from token spans. Nothing searches for a template in tokens, which fails silently
//! where a tokenizer merges across its edge. The tokenizer is a closure: this crate depends on none.
//!
//! ```
//! # fn main() -> burn_peft::Result<()> {
//! use burn::tensor::Device;
//! use burn_peft::dataset::{Instruction, PaddedBatcher, TokenizeConfig, alpaca};
//!
//! let line = br#"{"instruction": "Translate to French.", "input": "cheese", "response": "fromage"}"#;
//! let data: Vec<Instruction> = burn_peft::dataset::parse_json_lines(&line[..], "data.jsonl")?;
//!
//! // One token per byte stands for a real tokenizer here; 256 is its end-of-sequence token.
//! let bytes = |text: &str| Ok::<_, std::convert::Infallible>(text.bytes().map(u32::from).collect());
//! let config = TokenizeConfig::new().with_eos(256).with_max_tokens(512);
//! let example = config.tokenize(&alpaca(&data[0]), bytes)?;
//! assert_eq!(example.supervised_count(), "fromage".len() + 1);
//!
//! let batch = PaddedBatcher::new(256).collate(&[example]).to_device(&Device::default());
//! assert_eq!(batch.supervised, "fromage".len() + 1);
//! # Ok(())
//! # }
//! ```

mod alpaca;
mod batch;
mod chatml;
mod example;
mod instruction;
mod json_lines;
mod segment;

pub use alpaca::{alpaca, alpaca_prompt};
pub use batch::{Batch, HostBatch, PaddedBatcher};
pub use chatml::{Conversation, Message, chatml, chatml_prompt};
pub use example::{Example, TokenizeConfig, Truncation};
pub use instruction::{Instruction, InstructionKeys};
pub use json_lines::{parse_instructions, parse_json_lines, read_instructions, read_json_lines};
pub use segment::Segment;
