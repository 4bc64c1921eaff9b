//! Questions with one right answer of one word, and the two forms that an answer may have.

use std::error::Error;

use burn_peft::dataset::{Example, Instruction, alpaca_prompt, read_json_lines};
use llama::config::LlamaConfig;
use llama::text;
use llama::tokenizer::Tokenizer;

use crate::args::Args;

/// Tokens in a window of the base's own text.
const TEXT_WINDOW: usize = 128;

/// A question, as tokens that a model is asked with, and its answer.
#[derive(Clone, Debug)]
pub struct Question {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The right answer, one word.
    pub answer: String,
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `Peru`
    Word,
    /// `It is Peru.`
    Sentence,
}

impl Form {
    /// The answer in this form.
    pub fn of(self, answer: &str) -> String {
        match self {
            Self::Word => answer.to_owned(),
            Self::Sentence => format!("It is {answer}."),
        }
    }
}

/// Whether a text is a sentence of the form, whatever it says.
pub fn is_sentence(text: &str) -> bool {
    word_of(text) != text
}

/// What a text answers: the word of a sentence of the form, or the text itself.
pub fn word_of(text: &str) -> &str {
    let inner = text
        .strip_prefix("It is ")
        .and_then(|rest| rest.strip_suffix('.'));
    inner.filter(|word| !word.is_empty()).unwrap_or(text)
}

/// What a run learns from and is measured on.
pub struct Data {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The token that ends an answer.
    pub end: u32,
    /// Questions to train on.
    pub train: Vec<Question>,
    /// Questions held out.
    pub heldout: Vec<Question>,
    /// Windows of held-out text of the base's own task.
    pub text: Vec<Example>,
    bos: Option<u32>,
}

impl Data {
    /// Reads the files that `args` names. Questions whose answer is not one word are left out.
    pub fn load(args: &Args) -> Result<Self, Box<dyn Error>> {
        let config = LlamaConfig::from_dir(&args.model)?;
        let tokenizer = Tokenizer::from_dir(&args.model)?;
        let end = *config
            .eos_token_ids
            .first()
            .ok_or("config.json names no eos_token_id: answers would have no end")?;
        let lines = std::fs::read_to_string(&args.text)
            .map_err(|error| format!("{}: {error}", args.text.display()))?;
        let text = text::windows(lines.lines(), &tokenizer, end, TEXT_WINDOW)?;
        let mut data = Self {
            tokenizer,
            end,
            train: Vec::new(),
            heldout: Vec::new(),
            text,
            bos: config.bos_token_id,
        };
        data.train = data.questions(read_json_lines(&args.data)?)?;
        data.heldout = data.questions(read_json_lines(args.heldout_path())?)?;
        // Spread over the kinds of questions, which stand one after another.
        let step = (data.heldout.len() / args.questions).max(1);
        data.heldout = data
            .heldout
            .into_iter()
            .step_by(step)
            .take(args.questions)
            .collect();
        if data.train.is_empty() || data.heldout.is_empty() {
            return Err("no question has an answer of one word".into());
        }
        println!(
            "{} questions to train on, {} held out, each with an answer of one word",
            data.train.len(),
            data.heldout.len(),
        );
        Ok(data)
    }

    fn questions(&self, triples: Vec<Instruction>) -> Result<Vec<Question>, Box<dyn Error>> {
        let one_word = |triple: &Instruction| triple.response.chars().all(char::is_alphanumeric);
        triples
            .into_iter()
            .filter(one_word)
            .map(|triple| {
                let prompt = self.tokenizer.encode(&alpaca_prompt(&triple), false)?;
                Ok(Question {
                    prompt: self.bos.into_iter().chain(prompt).collect(),
                    answer: triple.response,
                })
            })
            .collect()
    }

    /// The tokens of an answer with its end.
    pub fn completion(&self, answer: &str) -> Result<Vec<u32>, Box<dyn Error>> {
        let mut tokens = self.tokenizer.encode(answer, false)?;
        tokens.push(self.end);
        Ok(tokens)
    }

    /// The text of a completion, without its end and the white space around it.
    pub fn text_of(&self, completion: &[u32]) -> Result<String, Box<dyn Error>> {
        let tokens: Vec<u32> = completion
            .iter()
            .copied()
            .filter(|&token| token != self.end)
            .collect();
        Ok(self.tokenizer.decode(&tokens)?.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_told_apart() {
        assert_eq!(Form::Sentence.of("Peru"), "It is Peru.");
        for (text, word, sentence) in [
            ("It is Peru.", "Peru", true),
            ("Peru", "Peru", false),
            ("It is Peru", "It is Peru", false),
            ("It is .", "It is .", false),
            ("Peru.", "Peru.", false),
        ] {
            assert_eq!((word_of(text), is_sentence(text)), (word, sentence));
        }
    }
}
