//! Data for fine-tuning and alignment: from a JSON lines file to padded or packed batches that say which tokens are learned.
//!
//! ```text
//! JSON lines ─read─> Instruction ─render─> [Segment] ─tokenize─> Example ─collate─> Batch ─> sft_loss
//! JSON lines ─stream─> Preference ─tokenize_preference─> PreferenceExample ─collate_preferences─> PreferenceBatch
//! ```
//!
//! Rows for alignment have the field names of TRL: [`Preference`], [`Feedback`], [`Prompt`], [`Demonstration`]. Texts are tokenised as they
//! stand; messages are rendered by a [`ChatFormat`] first, [`ChatMl`] or, with the feature `chat-template`, a model's own template.
//! [`JsonLines`] streams a file larger than memory, [`Intake`] counts what is kept, cut and skipped, and [`PackedBatcher`] puts several
//! sequences into a row. Before training, [`exact_duplicates`], [`NearDuplicates`], [`contamination`] and [`Lengths`] look at the data, and
//! [`Mixture`] draws from several sources.
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
mod chat_format;
#[cfg(feature = "chat-template")]
mod chat_template;
mod chatml;
mod curate;
mod example;
mod instruction;
mod intake;
mod json_lines;
mod labels;
mod lines;
mod pack;
mod packed_batch;
mod preference_batch;
mod response;
mod response_example;
mod rows;
mod segment;
mod stream;

pub use alpaca::{alpaca, alpaca_prompt};
pub use batch::{Batch, HostBatch, PaddedBatcher};
pub use chat_format::{ChatFormat, ChatMl, PlainText};
#[cfg(feature = "chat-template")]
pub use chat_template::{ChatTemplate, RenderOptions};
pub use chatml::{Conversation, Message, chatml, chatml_prompt};
pub use curate::{Lengths, Mixture, NearDuplicates, contamination, exact_duplicates};
pub use example::{Example, TokenizeConfig, Truncation};
pub use instruction::{Instruction, InstructionKeys};
pub use intake::{Intake, RowFault, Taken};
pub use json_lines::{parse_instructions, parse_json_lines, read_instructions, read_json_lines};
pub use labels::SequenceLabels;
pub use pack::{Overflow, PackingReport, Piece, pack, pack_wrapped};
pub use packed_batch::{PackedBatch, PackedBatcher, PackedSegment};
pub use preference_batch::{FeedbackBatch, PreferenceBatch};
pub use response_example::{Boundary, FeedbackExample, PreferenceExample, ResponseExample};
pub use rows::{Demonstration, Feedback, Preference, Prompt, Text};
pub use segment::Segment;
pub use stream::{JsonLines, Place, Placed};
