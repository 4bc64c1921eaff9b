//! From triples to tokens: the rendering, its end, and examples put before the question.

use std::error::Error;

use burn_peft::Result;
use burn_peft::dataset::{
    Example, Instruction, Message, Segment, TokenizeConfig, alpaca, alpaca_prompt, chatml,
};

use crate::args::{Args, PromptStyle};
use llama::config::LlamaConfig;
use llama::error::LlamaError;
use llama::tokenizer::Tokenizer;

/// Renders and tokenises triples for one model.
pub struct Prompter {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The tokens that end an answer.
    pub eos: Vec<u32>,
    style: PromptStyle,
    system: Option<Message>,
    config: TokenizeConfig,
}

impl Prompter {
    /// The rendering that `args` asks for, or that the tokenizer suggests.
    ///
    /// # Errors
    ///
    /// When an answer would have no end: the model names no end token and the tokenizer has no `<|im_end|>`.
    pub fn new(
        tokenizer: Tokenizer,
        model: &LlamaConfig,
        args: &Args,
    ) -> Result<Self, Box<dyn Error>> {
        let end_of_turn = tokenizer.token("<|im_end|>");
        let style = args.prompt.unwrap_or(match end_of_turn {
            Some(_) => PromptStyle::Chat,
            None => PromptStyle::Alpaca,
        });
        let mut eos = model.eos_token_ids.clone();
        let config = match style {
            PromptStyle::Chat => {
                eos.extend(end_of_turn);
                TokenizeConfig::new()
            }
            PromptStyle::Alpaca => TokenizeConfig {
                bos: model.bos_token_id,
                eos: eos.first().copied(),
                ..Default::default()
            },
        };
        if eos.is_empty() {
            return Err("config.json names no eos_token_id: answers would have no end".into());
        }
        let system = (!args.system.is_empty()).then(|| Message::new("system", &args.system));
        Ok(Self {
            tokenizer,
            eos,
            style,
            system,
            config,
        })
    }

    /// A triple with its response after `shots` with theirs. The triple's own response and its end are supervised.
    pub fn example(&self, triple: &Instruction, shots: &[Instruction]) -> Result<Example> {
        let segments = match self.style {
            PromptStyle::Chat => {
                let turns = shots.iter().chain([triple]).flat_map(Instruction::messages);
                let mut segments =
                    chatml(&self.system.iter().cloned().chain(turns).collect::<Vec<_>>());
                // Nothing is learned from the line break after the answer, nor from the answers before.
                segments.pop_if(|segment| !segment.supervised);
                if let Some((_, before)) = segments.split_last_mut() {
                    before
                        .iter_mut()
                        .for_each(|segment| segment.supervised = false);
                }
                segments
            }
            PromptStyle::Alpaca => {
                let answered = shots
                    .iter()
                    .map(|shot| format!("{}{}\n\n", alpaca_prompt(shot), shot.response));
                std::iter::once(Segment::context(answered.collect::<String>()))
                    .chain(alpaca(triple))
                    .collect()
            }
        };
        self.config
            .tokenize(&segments, |text| self.tokenizer.encode(text, false))
    }

    /// The text of an answer, without the white space around it.
    pub fn text(&self, tokens: &[u32]) -> Result<String, LlamaError> {
        Ok(self.tokenizer.decode(tokens)?.trim().to_owned())
    }
}

/// The tokens of an example up to its answer: what a model is asked with.
pub fn question(example: &Example) -> Vec<u32> {
    let (tokens, supervised) = (example.tokens(), example.supervised());
    tokens
        .iter()
        .zip(supervised)
        .take_while(|(_, supervised)| !**supervised)
        .map(|(token, _)| *token)
        .collect()
}
