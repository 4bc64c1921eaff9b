//! A completion depends on its own place and prompt, and on nothing else.

use burn_peft::rollout::{Completion, Draws, Finish, Sampler, Stop, generate};

use super::recurrent::Recurrent;

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 2, 3], vec![4], vec![5, 6, 7, 8, 9, 10], vec![4]]
}

fn sampled(prompts: &[Vec<u32>], copies: usize, draws: Draws) -> Vec<Completion> {
    let sampler = Sampler::new().with_temperature(1.5);
    let stop = Stop::new(20).with_tokens([0, 13]);
    generate(
        &mut Recurrent::new(),
        prompts,
        copies,
        &sampler,
        &stop,
        draws,
    )
    .unwrap()
}

#[test]
fn a_completion_is_the_same_alone_and_in_a_batch() {
    let prompts = prompts();
    let draws = Draws::new(3).with_step(9);
    let together = sampled(&prompts, 3, draws);
    assert_eq!(together.len(), 12);
    for (index, own) in together.iter().enumerate() {
        assert_eq!([own.prompt, own.copy], [index / 3, index % 3]);
        let place = draws
            .with_first_prompt(own.prompt as u64)
            .with_first_copy(own.copy as u64);
        let alone = sampled(&prompts[own.prompt..][..1], 1, place);
        let [alone] = alone.as_slice() else { panic!() };
        assert_eq!(alone.tokens, own.tokens);
        // One row and many take other products.
        for (a, b) in alone.log_probs.iter().zip(&own.log_probs) {
            assert!((a - b).abs() < 1e-5, "{a}, {b}");
        }
        assert_eq!(alone.finish, own.finish);
        assert_eq!(own.log_probs.len(), own.tokens.len());
        assert_eq!(own.tempered_log_probs, own.sampled_log_probs);
        assert!(own.tempered_log_probs != own.log_probs);
    }
    // Rows end at different times, by both causes; copies and equal prompts differ.
    assert!(
        together
            .iter()
            .any(|own| own.finish == Finish::Length && own.tokens.len() == 20)
    );
    assert!(
        together
            .iter()
            .any(|own| own.finish == Finish::Stop && own.tokens.len() < 20)
    );
    assert_ne!(together[0].tokens, together[1].tokens);
    assert_ne!(together[3].tokens, together[9].tokens);
}

#[test]
fn seed_and_step_decide_the_text() {
    let prompts = prompts();
    let texts = |draws| -> Vec<Vec<u32>> {
        let completions = sampled(&prompts, 2, draws);
        completions.into_iter().map(|own| own.tokens).collect()
    };
    let draws = Draws::new(3);
    assert_eq!(texts(draws), texts(3.into()));
    assert_ne!(texts(draws), texts(Draws::new(4)));
    assert_ne!(texts(draws), texts(draws.with_step(1)));
}

/// The model is asked for each prompt once, and for the rows that are left.
#[test]
fn rows_that_ended_leave_the_batch() {
    let mut model = Recurrent::new();
    let stop = Stop::new(20).with_tokens([0, 13]);
    let sampler = Sampler::new().with_temperature(1.5);
    let completions = generate(&mut model, &prompts(), 3, &sampler, &stop, 3).unwrap();
    let (first, steps) = model.calls.split_first().unwrap();
    assert_eq!(first, "prefill 4 x 3");
    let longest = completions
        .iter()
        .map(|own| own.tokens.len())
        .max()
        .unwrap();
    assert_eq!(steps.len(), longest - 1);
    // After `n` tokens, those with more than `n` are left, numbered as in the step before.
    let mut live: Vec<&Completion> = completions.iter().collect();
    for (before, call) in steps.iter().enumerate() {
        let left = |own: &&Completion| own.tokens.len() > before + 1;
        let keep: Vec<usize> = (0..live.len()).filter(|row| left(&live[*row])).collect();
        live.retain(left);
        let tokens: Vec<u32> = live.iter().map(|own| own.tokens[before]).collect();
        assert_eq!(*call, format!("step {tokens:?} {keep:?}"));
    }
    assert!(live.len() < completions.len());
}
