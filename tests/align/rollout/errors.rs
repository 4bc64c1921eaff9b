//! Bad input has an error that names it, and no token is drawn from what is no distribution.

use burn_peft::PeftError;
use burn_peft::rollout::{Completion, Decode, Sampler, Stop, generate};

use super::logits::{Scripted, sure};
use super::recurrent::{Recurrent, VOCABULARY};

fn run(
    model: &mut impl Decode,
    prompts: &[Vec<u32>],
    sampler: &Sampler,
    stop: &Stop,
) -> Result<Vec<Completion>, PeftError> {
    generate(model, prompts, 2, sampler, stop, 0)
}

fn text(result: Result<Vec<Completion>, PeftError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn prompts_that_cannot_be_continued() {
    let prompts = |second: &[u32]| [vec![1], second.to_vec()];
    let cases: [(&[u32], &str); 4] = [
        (&[], "prompt 1: it has no token"),
        (
            &[3, 24],
            "prompt 1: token 24 at 1: expected one of the 24 tokens",
        ),
        (&[1; 5], "prompt 1: it has 5 tokens, at most 4 are allowed"),
        (&[1; 3], "prompt 1: it has 3 tokens, and the model takes 3"),
    ];
    for (index, (prompt, expected)) in cases.into_iter().enumerate() {
        let mut model = Recurrent::new();
        if index == 3 {
            model.limit = 3;
        }
        let stop = Stop::new(5).with_max_prompt_tokens(4);
        let error = text(run(&mut model, &prompts(prompt), &Sampler::new(), &stop));
        assert!(error.starts_with(expected), "{error}");
        assert!(model.calls.is_empty(), "the model ran");
    }
    let none = run(&mut Recurrent::new(), &[], &Sampler::new(), &Stop::new(5));
    assert_eq!(none.unwrap(), []);
}

#[test]
fn options_out_of_range() {
    let new = Sampler::new;
    let cases = [
        (new().with_temperature(-1.0), "Sampler::temperature = -1"),
        (
            new().with_temperature(f64::NAN),
            "Sampler::temperature = NaN",
        ),
        (
            new().with_temperature(1e-9),
            "Sampler::temperature = 0.000000001",
        ),
        (new().with_top_k(0), "Sampler::top_k = 0"),
        (new().with_top_p(0.0), "Sampler::top_p = 0"),
        (new().with_top_p(1.5), "Sampler::top_p = 1.5"),
        (new().with_top_p(f64::NAN), "Sampler::top_p = NaN"),
        (new().with_min_p(-0.1), "Sampler::min_p = -0.1"),
        (new().with_min_p(f64::NAN), "Sampler::min_p = NaN"),
        (
            new().with_repetition_penalty(0.0),
            "Sampler::repetition_penalty = 0",
        ),
        (
            new().with_repetition_penalty(f64::INFINITY),
            "Sampler::repetition_penalty = inf",
        ),
    ];
    for (sampler, expected) in cases {
        let error = text(run(
            &mut Recurrent::new(),
            &[vec![1]],
            &sampler,
            &Stop::new(5),
        ));
        assert!(
            error.starts_with(&format!("{expected}: expected ")),
            "{error}"
        );
        assert!(sampler.distribution(&[0.0], &[]).is_err());
    }
    let decode = |_: &[u32]| Ok::<_, PeftError>(String::new());
    let outside = VOCABULARY as u32;
    let cases = [
        (Stop::new(0), "Stop::max_tokens = 0"),
        (
            Stop::new(5).with_tokens([1, outside]),
            "token of Stop::tokens = 24",
        ),
        (
            Stop::new(5).with_strings(["a", ""], decode),
            "string of Stop::strings = \"\"",
        ),
    ];
    for (stop, expected) in cases {
        let error = text(run(&mut Recurrent::new(), &[vec![1]], &new(), &stop));
        assert!(
            error.starts_with(&format!("{expected}: expected ")),
            "{error}"
        );
    }
    let error = generate(
        &mut Recurrent::new(),
        &[vec![1]],
        0,
        &new(),
        &Stop::new(5),
        0,
    );
    assert!(text(error).starts_with("copies = 0: expected "));
}

#[test]
fn no_token_is_drawn_from_logits_that_are_no_distribution() {
    for sampler in [
        Sampler::new(),
        Sampler::greedy(),
        Sampler::new().with_top_k(2),
    ] {
        for bad in [f32::NAN, f32::INFINITY] {
            // The third row (prompt 1, copy 0), after two tokens.
            let script = |row, step| {
                let mut logits = sure(8, 3);
                if row == 2 && step == 2 {
                    logits[5] = bad;
                }
                logits
            };
            let mut model = Scripted::new(8, script);
            let prompts = [vec![1], vec![2]];
            let error = run(&mut model, &prompts, &sampler, &Stop::new(5)).unwrap_err();
            let PeftError::Logits {
                prompt,
                copy,
                step,
                token,
                value,
            } = error
            else {
                panic!("{error}")
            };
            assert_eq!([prompt, copy, step, token], [1, 0, 2, 5]);
            assert_eq!(value.to_bits(), bad.to_bits());
        }
        let mut model = Scripted::new(8, |_, _| vec![f32::NEG_INFINITY; 8]);
        let error = text(run(&mut model, &[vec![1]], &sampler, &Stop::new(5)));
        assert!(
            error.contains("prompt 0, token 0: the logit of token 0 is -inf"),
            "{error}"
        );
        // A single token that is possible is drawn.
        let only = || {
            let mut logits = vec![f32::NEG_INFINITY; 8];
            logits[6] = -1e30;
            logits
        };
        let mut model = Scripted::new(8, |_, _| only());
        let own = run(&mut model, &[vec![1]], &sampler, &Stop::new(2)).unwrap();
        assert_eq!(own[0].tokens, [6, 6]);
        assert_eq!(own[0].log_probs, [0.0, 0.0]);
    }
}

#[test]
fn logits_of_another_shape() {
    let mut model = Scripted::new(8, |_, step| vec![0.0; if step == 0 { 8 } else { 9 }]);
    let error = text(run(&mut model, &[vec![1]], &Sampler::new(), &Stop::new(5)));
    assert_eq!(
        error,
        "tensor `logits`: expected shape [2, 8], found [2, 9]"
    );
}

#[test]
fn a_decoder_that_fails() {
    let fail = |_: &[u32]| Err::<String, _>("no such token");
    let stop = Stop::new(5).with_strings(["a"], fail);
    let error = text(run(
        &mut Recurrent::new(),
        &[vec![1]],
        &Sampler::new(),
        &stop,
    ));
    assert!(
        error.starts_with("the tokenizer failed on \"the tokens ["),
        "{error}"
    );
    assert!(error.ends_with("no such token"), "{error}");
}

#[test]
fn a_public_distribution_checks_its_arguments() {
    let new = Sampler::new();
    let error = new.distribution(&[0.0, f32::NAN], &[]).unwrap_err();
    assert!(error.to_string().contains("flat index 1"), "{error}");
    assert!(new.distribution(&[], &[]).is_err());
    let error = new.distribution(&[0.0, 1.0], &[2]).unwrap_err();
    assert!(
        error.to_string().starts_with("token of the context = 2"),
        "{error}"
    );
}
