//! Alpaca's prompt: a sentence on what follows, then sections headed `###`, learned after `### Response:`.
//!
//! The text is [Stanford Alpaca](https://github.com/tatsu-lab/stanford_alpaca)'s to the byte, in both of its forms.
//! The response follows the colon directly, and the tokenizer's end-of-sequence token follows the response
//! ([`TokenizeConfig::with_eos`](super::TokenizeConfig::with_eos)).

use super::{Instruction, Segment};

/// Renders a triple with its response, which alone is supervised.
pub fn alpaca(triple: &Instruction) -> Vec<Segment> {
    vec![
        Segment::context(alpaca_prompt(triple)),
        Segment::supervised(&triple.response),
    ]
}

/// Renders a triple up to where its response begins, for generation.
///
/// An empty input takes the form without a section for it.
pub fn alpaca_prompt(triple: &Instruction) -> String {
    let Instruction {
        instruction, input, ..
    } = triple;
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn triple(input: &str) -> Instruction {
        Instruction {
            instruction: "Add.".into(),
            input: input.into(),
            response: "3".into(),
        }
    }

    #[test]
    fn both_forms_are_stanfords_text() {
        assert_eq!(
            alpaca_prompt(&triple("1 and 2")),
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"
        );
        assert_eq!(
            alpaca_prompt(&triple("")),
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
        );
    }

    #[test]
    fn the_response_alone_is_supervised() {
        let triple = triple("");
        let segments = alpaca(&triple);
        assert_eq!(
            segments,
            [
                Segment::context(alpaca_prompt(&triple)),
                Segment::supervised("3")
            ]
        );
    }
}
