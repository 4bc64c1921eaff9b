//! The unit of instruction data: what is asked, what about, and the answer to learn.

use serde::{Deserialize, Serialize};

/// One (instruction, input, response) triple.
///
/// In JSON an object of these three keys; `input` may be missing, `output` (Alpaca's word) reads as `response`, and
/// other keys are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Instruction {
    /// The task, in words.
    pub instruction: String,
    /// What the task is about; empty where the instruction says it all.
    #[serde(default)]
    pub input: String,
    /// The answer to learn.
    #[serde(alias = "output")]
    pub response: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_alpaca_read_too() {
        let alpaca = r#"{"instruction": "a", "output": "c", "text": "ignored"}"#;
        let ours = r#"{"instruction":"a","input":"","response":"c"}"#;
        let triple: Instruction = serde_json::from_str(alpaca).unwrap();
        assert_eq!(serde_json::to_string(&triple).unwrap(), ours);
        assert_eq!(serde_json::from_str::<Instruction>(ours).unwrap(), triple);
    }

    #[test]
    fn a_triple_without_response_is_an_error() {
        let error = serde_json::from_str::<Instruction>(r#"{"instruction": "a"}"#).unwrap_err();
        assert!(error.to_string().contains("response"), "{error}");
    }
}
