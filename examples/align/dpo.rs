//! Direct preference optimisation on the form of answers.
//!
//! The reference answers in words and in sentences as often. Pairs prefer the sentence; both answers of a pair say the same. Controls:
//! the labels reversed, which must turn the form around, and labels at random, which must leave it. The first loss must be ln 2: it is not
//! where the base is taken as the reference of a trained adapter.

use std::error::Error;

use burn::optim::GradientsParams;
use burn_peft::objective::LogProbsConfig;
use burn_peft::objective::preference::{DpoConfig, Pairs, dpo_loss};
use burn_peft::optim::{check_gradients, check_loss};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::answers::{Data, Form, Question};
use crate::args::Args;
use crate::measure::{Scores, measure};
use crate::plot;
use crate::policy::{self, Policy};
use crate::report::{Log, Step, table};
use crate::sft;

/// Which answer of a pair is preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Labels {
    Sentences,
    Words,
    Random,
}

const RUNS: [(&str, Labels); 3] = [
    ("DPO", Labels::Sentences),
    ("reversed labels", Labels::Words),
    ("random labels", Labels::Random),
];

/// All runs and seeds, their table and their picture.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let data = Data::load(args)?;
    let mut log = Log::new(&args.out)?;
    let mut scores = vec![("SFT (the reference)".to_owned(), Scores::default())];
    scores.extend(RUNS.map(|(name, _)| (name.to_owned(), Scores::default())));
    for seed in args.seed..args.seed + args.seeds {
        let start = sft::train(args, &data, true, seed)?;
        let reference = start.reference();
        scores[0]
            .1
            .extend(measure(&start, &reference, &data, seed)?);
        for (index, (name, labels)) in RUNS.into_iter().enumerate() {
            let policy = train(
                args,
                &data,
                start.clone(),
                &reference,
                (name, labels),
                seed,
                &mut log,
            )?;
            scores[1 + index]
                .1
                .extend(measure(&policy, &reference, &data, seed)?);
        }
    }
    println!("{}", table(&scores));
    plot::curves(
        &log.steps,
        [
            "share of pairs told apart",
            "log-ratio of preferred answers, nats",
        ],
        &args.out.join("align.png"),
    )?;
    println!("steps.jsonl and align.png are in {}", args.out.display());
    Ok(())
}

fn train(
    args: &Args,
    data: &Data,
    mut policy: Policy,
    reference: &Policy,
    (name, labels): (&str, Labels),
    seed: u64,
    log: &mut Log,
) -> Result<Policy, Box<dyn Error>> {
    let steps = args.steps.unwrap_or(20);
    let config = DpoConfig::new().with_beta(args.beta);
    let mut optimizer = sft::optimizer();
    let mut rng = StdRng::seed_from_u64(seed);
    for step in 1..=steps {
        let questions: Vec<&Question> = (0..args.batch)
            .map(|_| &data.train[rng.random_range(0..data.train.len())])
            .collect();
        let mut pairs = [Vec::new(), Vec::new()];
        for question in questions {
            let prefers_sentence = match labels {
                Labels::Sentences => true,
                Labels::Words => false,
                Labels::Random => rng.random(),
            };
            let forms = match prefers_sentence {
                true => [Form::Sentence, Form::Word],
                false => [Form::Word, Form::Sentence],
            };
            for (side, form) in pairs.iter_mut().zip(forms) {
                let completion = data.completion(&form.of(&question.answer))?;
                side.push(policy::example(&question.prompt, &completion)?);
            }
        }
        // All that is chosen, then all that is rejected.
        let examples = pairs.concat();
        let statistics = LogProbsConfig::new().with_statistics(true);
        let new = policy::log_probs(&policy, &examples, &statistics)?;
        let old = policy::log_probs(reference, &examples, &LogProbsConfig::new())?;
        let loss = dpo_loss(&Pairs::halves(new)?, &Pairs::halves(old)?, &config)?;
        let mean = loss.mean();
        let gradients = GradientsParams::from_grads(mean.backward(), &policy);
        let value = check_loss(&mean, step as u64)?;
        check_gradients(&*policy, &gradients, step as u64)?;
        policy = optimizer.step(args.lr.unwrap_or(5e-4), policy, gradients);
        let metrics = loss.metrics()?;
        if step == 1 {
            println!(
                "{name}, seed {seed}: first loss {value:.6} (ln 2 is {:.6})",
                2_f64.ln()
            );
        }
        log.add(Step {
            run: name.to_owned(),
            seed,
            step,
            loss: value.into(),
            reward: metrics.accuracy.into(),
            distance: f64::from(metrics.reward_chosen) / args.beta,
            entropy: metrics.entropy.unwrap_or_default().into(),
            tokens: examples
                .iter()
                .map(|own| own.supervised_count())
                .sum::<usize>() as f64
                / examples.len() as f64,
        })?;
    }
    Ok(policy)
}
