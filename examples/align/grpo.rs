//! Group relative policy optimisation on the correctness of answers.
//!
//! The reward is 1 for the right answer and 0 for any other, checked by the program. Control: a reward at random, of the same mean, which must
//! destroy what the policy knows.

use std::error::Error;

use burn::optim::GradientsParams;
use burn_peft::objective::policy::{
    PolicyBatch, PolicyConfig, Scale, group_advantages, policy_loss,
};
use burn_peft::objective::{LogProbs, LogProbsConfig, Ragged};
use burn_peft::optim::{check_gradients, check_loss};
use burn_peft::rollout::{Draws, Rewards, Rollout, Sampler};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::answers::{Data, Question, word_of};
use crate::args::Args;
use crate::measure::{Scores, measure};
use crate::plot;
use crate::policy::{self, Policy};
use crate::report::{Log, Step, table};
use crate::sft;

/// What is rewarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reward {
    Right,
    Random,
}

const RUNS: [(&str, Reward); 2] = [("GRPO", Reward::Right), ("random reward", Reward::Random)];

/// All runs and seeds, their table and their picture.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let data = Data::load(args)?;
    let mut log = Log::new(&args.out)?;
    let mut scores = vec![("SFT (the reference)".to_owned(), Scores::default())];
    scores.extend(RUNS.map(|(name, _)| (name.to_owned(), Scores::default())));
    for seed in args.seed..args.seed + args.seeds {
        let start = sft::train(args, &data, false, seed)?;
        let reference = start.reference();
        scores[0]
            .1
            .extend(measure(&start, &reference, &data, seed)?);
        for (index, run) in RUNS.into_iter().enumerate() {
            let policy = train(args, &data, start.clone(), run, seed, &mut log)?;
            scores[1 + index]
                .1
                .extend(measure(&policy, &reference, &data, seed)?);
        }
    }
    println!("{}", table(&scores));
    plot::curves(
        &log.steps,
        ["mean reward", "distance to the sampling policy, nats"],
        &args.out.join("align.png"),
    )?;
    println!("steps.jsonl and align.png are in {}", args.out.display());
    Ok(())
}

fn train(
    args: &Args,
    data: &Data,
    mut policy: Policy,
    (name, reward): (&str, Reward),
    seed: u64,
    log: &mut Log,
) -> Result<Policy, Box<dyn Error>> {
    let steps = args.steps.unwrap_or(25);
    let config = PolicyConfig::dapo();
    let mut optimizer = sft::optimizer();
    let mut rng = StdRng::seed_from_u64(seed);
    for step in 1..=steps {
        let questions: Vec<&Question> = (0..args.batch)
            .map(|_| &data.train[rng.random_range(0..data.train.len())])
            .collect();
        let prompts: Vec<Vec<u32>> = questions.iter().map(|own| own.prompt.clone()).collect();
        let draws = Draws::new(seed).with_step(step as u64);
        let sampled = policy::sample(&policy, &prompts, args.group, &Sampler::new(), data, draws)?;

        let texts: Vec<String> = sampled
            .iter()
            .map(|own| data.text_of(&own.tokens))
            .collect::<Result<_, _>>()?;
        let coins: Vec<f64> = sampled
            .iter()
            .map(|_| f64::from(u8::from(rng.random::<bool>())))
            .collect();
        let rows: Vec<usize> = (0..sampled.len()).collect();
        let rollouts: Vec<Rollout<usize>> = sampled
            .iter()
            .zip(&rows)
            .map(|(own, row)| Rollout::new(&prompts[own.prompt], own).with_data(row))
            .collect();
        let right = |rollout: &Rollout<usize>| {
            let row = *rollout.data;
            match reward {
                Reward::Right => {
                    let answer = &questions[row / args.group].answer;
                    f64::from(u8::from(word_of(&texts[row]) == answer))
                }
                Reward::Random => coins[row],
            }
        };
        let rewards = Rewards::new().with(name, 1.0, right).score(&rollouts)?;
        let totals: Vec<f32> = rewards.totals.iter().map(|&total| total as f32).collect();
        let advantages = group_advantages(&totals, args.group, Scale::Group)?;

        let examples: Vec<_> = sampled
            .iter()
            .map(|own| policy::example(&prompts[own.prompt], &own.tokens))
            .collect::<Result<_, _>>()?;
        let statistics = LogProbsConfig::new().with_statistics(true);
        let new = policy::log_probs(&policy, &examples, &statistics)?;
        // One step of the optimiser for each sampling: the policy that sampled is this one.
        let old: LogProbs = new.clone().detach();
        let spread = Ragged::spread(&advantages.values, new.lens())?;
        let loss = policy_loss(&PolicyBatch::new(&new, &old, &spread)?, &config)?;
        let mean = loss.mean();
        let gradients = GradientsParams::from_grads(mean.backward(), &policy);
        let value = check_loss(&mean, step as u64)?;
        check_gradients(&*policy, &gradients, step as u64)?;
        let metrics = loss.metrics()?;
        policy = optimizer.step(args.lr.unwrap_or(1e-3), policy, gradients);

        // How far training is from sampling, which is another kernel for few rows: a check on both.
        let sampled_by: Vec<f32> = sampled
            .iter()
            .flat_map(|own| own.log_probs.clone())
            .collect();
        let trained_by = old.to_ragged()?;
        let gap = sampled_by
            .iter()
            .zip(trained_by.values())
            .fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        if gap > 0.05 {
            return Err(format!(
                "step {step}: log-probabilities of sampling and training differ by {gap}"
            )
            .into());
        }
        log.add(Step {
            run: name.to_owned(),
            seed,
            step,
            loss: value.into(),
            reward: advantages.mean.into(),
            distance: metrics.approx_kl.into(),
            entropy: metrics.entropy.unwrap_or_default().into(),
            tokens: new.tokens() as f64 / new.sequences() as f64,
        })?;
        if step == 1 || step % 20 == 0 {
            println!(
                "{name}, seed {seed}, step {step}: reward {:.3}, groups of equal rewards {:.2}, entropy {:.2}",
                advantages.mean,
                advantages.equal_groups,
                metrics.entropy.unwrap_or_default(),
            );
        }
    }
    Ok(policy)
}
