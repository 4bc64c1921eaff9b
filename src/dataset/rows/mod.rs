//! Rows of the data for alignment, with the names that TRL gives to their fields.
//!
//! | Row | Fields | For |
//! |---|---|---|
//! | [`Conversation`](super::Conversation) | `messages`, `tools` | instruction tuning on conversations |
//! | [`Demonstration`] | `prompt`, `completion` | instruction tuning |
//! | [`Preference`] | `prompt`, `chosen`, `rejected`, `margin` | DPO and its kin, reward models |
//! | [`Feedback`] | `prompt`, `completion`, `label` | KTO |
//! | [`Prompt`] | `prompt`, any others | PPO, GRPO: answers are sampled |
//!
//! Every field but `label`, `margin` and `tools` is a [`Text`]: a string or a list of messages.

mod fields;
mod preference;
mod single;
mod text;

pub use preference::Preference;
pub use single::{Demonstration, Feedback, Prompt};
pub use text::Text;
