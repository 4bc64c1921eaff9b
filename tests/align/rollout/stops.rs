//! What ends a completion.

use std::cell::RefCell;
use std::convert::Infallible;

use burn_peft::rollout::{Completion, Finish, Sampler, Stop, generate};

use super::logits::{Scripted, sure};
use super::recurrent::Recurrent;

/// One row that says these tokens, and then token 0 for ever.
fn say(tokens: &[u32], stop: &Stop) -> Completion {
    let next = |_, step: usize| sure(256, tokens.get(step).copied().unwrap_or(0));
    let mut model = Scripted::new(256, next);
    let completions = generate(&mut model, &[vec![1]], 1, &Sampler::greedy(), stop, 0);
    completions.unwrap().pop().unwrap()
}

/// Tokens are bytes.
fn bytes(tokens: &[u32]) -> Result<String, Infallible> {
    let bytes: Vec<u8> = tokens.iter().map(|token| *token as u8).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn the_first_of_several_stop_tokens_ends_it_and_belongs_to_it() {
    let stop = Stop::new(9).with_tokens([7, 8]);
    let own = say(&[5, 8, 7, 5], &stop);
    assert_eq!(
        (own.tokens.as_slice(), own.finish),
        ([5, 8].as_slice(), Finish::Stop)
    );
    assert_eq!(own.without_stop_token(&stop), [5]);
    assert_eq!([own.log_probs.len(), own.sampled_log_probs.len()], [2, 2]);
    let own = say(&[5, 6], &stop);
    assert_eq!((own.tokens.len(), own.finish), (9, Finish::Length));
    assert_eq!(own.without_stop_token(&stop), own.tokens);
    // At the last place it is a stop.
    let own = say(&[5, 8], &Stop::new(2).with_tokens([8]));
    assert_eq!((own.tokens.len(), own.finish), (2, Finish::Stop));
}

#[test]
fn a_stop_string_ends_it_across_tokens() {
    let text = "the year is 1984.\n\nThe next question";
    let stop = Stop::new(100).with_strings(["\n\n", "###"], bytes);
    let own = say(&tokens(text), &stop);
    assert_eq!(own.finish, Finish::Stop);
    assert_eq!(own.tokens, tokens("the year is 1984.\n\n"));
    assert_eq!(own.text_before_stop.as_deref(), Some("the year is 1984."));
    let own = say(&tokens("a # b ## c ### d"), &stop);
    assert_eq!(own.text_before_stop.as_deref(), Some("a # b ## c "));
    assert_eq!(say(&tokens("none"), &stop).finish, Finish::Length);
    // At its very beginning, and in characters of several bytes.
    let own = say(&tokens("### a"), &stop);
    assert_eq!(
        (own.tokens.len(), own.text_before_stop.as_deref()),
        (3, Some(""))
    );
    let stop = Stop::new(100).with_strings(["。"], bytes);
    let own = say(&tokens("你好。再见"), &stop);
    assert_eq!(own.text_before_stop.as_deref(), Some("你好"));
    assert_eq!(own.tokens, tokens("你好。"));
}

/// Every stop string of a long text is found as soon as it is there, wherever it lies, though only the end of the text is decoded.
#[test]
fn a_stop_string_is_found_in_the_end_of_a_long_text() {
    let words: Vec<String> = (0..60).map(|word| format!("w{word} é🙂 ")).collect();
    let text = words.concat();
    for at in [0, 1, 7, 30, 59] {
        let string = format!("w{at} é🙂");
        let most = RefCell::new(0);
        let counted = |tokens: &[u32]| {
            let mut most = most.borrow_mut();
            *most = tokens.len().max(*most);
            bytes(tokens)
        };
        let stop = Stop::new(2000).with_strings([string.clone(), "absent".into()], counted);
        let own = say(&tokens(&text), &stop);
        let end = text.find(&string).unwrap() + string.len();
        assert_eq!(own.tokens, tokens(&text[..end]), "{string}");
        assert_eq!(
            own.text_before_stop.as_deref(),
            Some(&text[..end - string.len()])
        );
        drop(stop);
    }
    // The whole is decoded when a string is found, and never before.
    let most = RefCell::new(0);
    let counted = |tokens: &[u32]| {
        let mut most = most.borrow_mut();
        *most = tokens.len().max(*most);
        bytes(tokens)
    };
    let own = say(
        &tokens(&text),
        &Stop::new(500).with_strings(["absent"], counted),
    );
    assert_eq!(own.tokens.len(), 500);
    assert!(*most.borrow() < 50, "{most:?}");
}

/// A decoder of sentence pieces strips the space of its first token.
#[test]
fn a_decoder_that_strips_its_first_space_hides_no_stop_string() {
    let words = |tokens: &[u32]| {
        let text: String = tokens.iter().map(|token| format!(" w{token}")).collect();
        Ok::<_, Infallible>(text.trim_start().to_owned())
    };
    let said: Vec<u32> = (10..90).collect();
    for at in [11_u32, 12, 40, 88] {
        let stop = Stop::new(100).with_strings([format!("w{} w{at} ", at - 1)], words);
        let own = say(&said, &stop);
        assert_eq!(own.tokens.last(), Some(&(at + 1)), "{at}");
        assert_eq!(own.tokens.len() as u32, at + 2 - 10);
    }
}

#[test]
fn the_limit_of_the_model_ends_it_too() {
    let mut model = Recurrent::new();
    model.limit = 6;
    let prompts = [vec![1, 2, 3], vec![4, 5, 6, 7, 8]];
    let stop = Stop::new(50);
    let completions = generate(&mut model, &prompts, 2, &Sampler::new(), &stop, 0).unwrap();
    let lens: Vec<usize> = completions.iter().map(|own| own.tokens.len()).collect();
    assert_eq!(lens, [3, 3, 1, 1]);
    assert!(completions.iter().all(|own| own.finish == Finish::Length));
}
