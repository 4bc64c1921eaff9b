//! A byte-level BPE tokenizer for the example's small world.

use std::collections::HashSet;
use std::error::Error;
use std::path::Path;

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizer::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::byte_level::ByteLevel as ByteLevelProcessor;
use tokenizers::{AddedToken, NormalizerWrapper, TokenizerBuilder};

/// Where a turn of a conversation begins, and where a turn, or any text, ends.
const SPECIAL: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

/// Trains a tokenizer of `vocab` tokens on `texts` and writes `tokenizer.json` into `dir`.
///
/// Every line begins with an invisible space, so that a word has the same tokens wherever it stands, as with Llama 2's
/// tokenizer: what a small model has learned of ` mouse` would not reach `mouse` at the start of a line.
pub fn train(
    texts: &[String],
    vocab: usize,
    dir: &Path,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let lines = Split::new(
        SplitPattern::String("\n".into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )?;
    let bytes = ByteLevel::default().add_prefix_space(true);
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        Sequence,
        ByteLevelProcessor,
        ByteLevelDecoder,
    >::new()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(Sequence::new(vec![lines.into(), bytes.into()])))
    .with_decoder(Some(ByteLevelDecoder::default()))
    .build()?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab)
        .show_progress(false)
        .special_tokens(
            SPECIAL
                .iter()
                .map(|token| AddedToken::from(*token, true))
                .collect(),
        )
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<char>>())
        .build();
    tokenizer
        .train(&mut trainer, texts.iter().map(String::as_str))?
        .save(dir.join("tokenizer.json"), true)?;
    Ok(())
}
