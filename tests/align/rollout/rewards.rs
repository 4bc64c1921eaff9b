//! Rewards: weights, names, what is refused, and those that wait.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use burn_peft::PeftError;
use burn_peft::rollout::{
    AsyncReward, BoxError, Completion, Finish, Pending, Reward, Rewards, Rollout, Scores,
};

fn completion(tokens: &[u32]) -> Completion {
    let zeros = vec![0.0; tokens.len()];
    Completion {
        prompt: 0,
        copy: 0,
        tokens: tokens.to_vec(),
        log_probs: zeros.clone(),
        tempered_log_probs: zeros.clone(),
        sampled_log_probs: zeros,
        finish: Finish::Stop,
        text_before_stop: None,
    }
}

/// Three rollouts with the right answer as data.
fn with_rollouts<T>(f: impl FnOnce(&[Rollout<'_, str>]) -> T) -> T {
    let completions = [
        completion(&[1]),
        completion(&[1, 2]),
        completion(&[1, 2, 3]),
    ];
    let texts = ["Peru", "Chile", "Peru."];
    let of = |(own, text)| Rollout::new(&[7], own).with_text(text).with_data("Peru");
    let rollouts: Vec<_> = completions.iter().zip(texts).map(of).collect();
    f(&rollouts)
}

fn exact(rollout: &Rollout<str>) -> bool {
    rollout.text == rollout.data
}

fn error(result: Result<Scores, PeftError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_completion_gets_the_weighted_sum() {
    let rewards = Rewards::new()
        .with("exact", 2.0, exact)
        .with("length", -0.5, |rollout: &Rollout<str>| {
            rollout.tokens().len() as f64
        })
        .with("full stop", 1.0, |rollout: &Rollout<str>| {
            (rollout.text.len() == 5).then(|| rollout.text.ends_with('.'))
        });
    let scores = with_rollouts(|rollouts| rewards.score(rollouts)).unwrap();
    assert_eq!(scores.totals, [1.5, -1.0, -0.5]);
    let [_, _, stop] = scores.columns.as_slice() else {
        panic!()
    };
    assert_eq!(stop.values, [None, Some(0.0), Some(1.0)]);
    let summary = scores.summary();
    let of = |index: usize| {
        let own = &summary[index];
        (own.name.as_str(), own.count, own.mean, own.std)
    };
    assert_eq!(of(1), ("length", 3, 2.0, 1.0));
    assert_eq!(of(2), ("full stop", 2, 0.5, 0.5_f64.sqrt()));
    assert_eq!(scores.total().mean, 0.0);
    assert_eq!(summary[1].to_string(), "length 2.0000 ± 1.0000 (n = 3)");
}

/// As a reward model: all at once.
struct Whole<'a>(&'a Cell<usize>);

impl Reward<str> for Whole<'_> {
    fn score(&self, rollouts: &[Rollout<'_, str>]) -> Vec<Result<Option<f64>, BoxError>> {
        self.0.set(self.0.get() + 1);
        rollouts
            .iter()
            .map(|own| Ok(Some(own.prompt[0].into())))
            .collect()
    }
}

#[test]
fn a_reward_may_judge_all_at_once() {
    let calls = Cell::new(0);
    let rewards = Rewards::new().with("model", 1.0, |own: &Rollout<str>| own.prompt.len() as f32);
    let rewards = rewards.with("whole", 1.0, Whole(&calls));
    let scores = with_rollouts(|rollouts| rewards.score(rollouts)).unwrap();
    assert_eq!(scores.totals, [8.0; 3]);
    assert_eq!(calls.get(), 1);
}

#[test]
fn what_is_no_number_is_named_and_not_trained_on() {
    let score = |rewards: Rewards<str>| error(with_rollouts(|rollouts| rewards.score(rollouts)));
    let good = || Rewards::new().with("exact", 1.0, exact);

    let of_third =
        |value: f64| move |own: &Rollout<str>| if own.tokens().len() == 3 { value } else { 0.0 };
    let text = score(good().with("length", 1.0, of_third(f64::NAN)));
    assert!(
        text.starts_with("reward `length`, completion 2: its score is NaN"),
        "{text}"
    );
    let text = score(good().with("length", 1.0, of_third(f64::INFINITY)));
    assert!(
        text.starts_with("reward `length`, completion 2: its score is inf"),
        "{text}"
    );
    // Also where its weight is 0.
    let text = score(good().with("length", 0.0, of_third(f64::NAN)));
    assert!(text.contains("completion 2"), "{text}");
    let failing = |own: &Rollout<str>| match own.tokens().len() {
        2 => Err("the judge timed out"),
        _ => Ok(1.0),
    };
    let text = score(good().with("judge", 1.0, failing));
    assert!(
        text.starts_with("reward `judge`, completion 1: the judge timed out"),
        "{text}"
    );
    let none = |own: &Rollout<str>| (own.tokens().len() != 2).then_some(1.0);
    let text = score(Rewards::new().with("a", 1.0, none).with("b", 1.0, none));
    assert!(
        text.starts_with("reward `a, b`, completion 1: none of the rewards applies"),
        "{text}"
    );
    let huge = |_: &Rollout<str>| f64::MAX;
    let text = score(Rewards::new().with("a", 1e10, huge));
    assert!(text.contains("the weighted sum"), "{text}");

    struct Short;
    impl Reward<str> for Short {
        fn score(&self, _: &[Rollout<'_, str>]) -> Vec<Result<Option<f64>, BoxError>> {
            vec![Ok(Some(1.0))]
        }
    }
    let text = score(good().with("short", 1.0, Short));
    assert!(
        text.contains("it gave 1 scores for 3 completions"),
        "{text}"
    );

    let text = score(Rewards::new());
    assert!(
        text.starts_with("Rewards = none: expected at least one"),
        "{text}"
    );
    let text = score(good().with("exact", 1.0, exact));
    assert!(text.starts_with("name of a reward = exact"), "{text}");
    let text = score(good().with("other", f64::NAN, exact));
    assert!(text.starts_with("weight of reward `other` = NaN"), "{text}");
}

/// Waits twice, and wakes itself.
struct Server<'a> {
    running: &'a AtomicUsize,
    most: &'a AtomicUsize,
}

impl AsyncReward<str> for Server<'_> {
    fn score<'a>(&'a self, rollouts: &'a [Rollout<'a, str>]) -> Pending<'a> {
        Box::pin(async move {
            let running = self.running.fetch_add(1, Ordering::Relaxed) + 1;
            self.most.fetch_max(running, Ordering::Relaxed);
            let mut polls = 0;
            poll_fn(|context| {
                polls += 1;
                context.waker().wake_by_ref();
                match polls {
                    3 => Poll::Ready(()),
                    _ => Poll::Pending,
                }
            })
            .await;
            self.running.fetch_sub(1, Ordering::Relaxed);
            rollouts
                .iter()
                .map(|own| Ok(Some(own.text.len() as f64)))
                .collect()
        })
    }
}

struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// The smallest runtime there is.
fn block_on<F: Future>(future: F) -> F::Output {
    let woken = Arc::new(Woken(AtomicUsize::new(1)));
    let waker = Waker::from(woken.clone());
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        assert!(woken.0.swap(0, Ordering::Relaxed) > 0, "nothing woke it");
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
}

#[test]
fn rewards_that_wait_wait_together() {
    let [running, most] = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let server = || Server {
        running: &running,
        most: &most,
    };
    let rewards = Rewards::new()
        .with_async("first", 1.0, server())
        .with("exact", 10.0, exact)
        .with_async("second", 2.0, server());
    let scores = with_rollouts(|rollouts| block_on(rewards.score_async(rollouts))).unwrap();
    assert_eq!(scores.totals, [22.0, 15.0, 15.0]);
    let names: Vec<&str> = scores.columns.iter().map(|own| own.name.as_str()).collect();
    assert_eq!(names, ["first", "exact", "second"]);
    assert_eq!(most.load(Ordering::Relaxed), 2);
    let text = error(with_rollouts(|rollouts| rewards.score(rollouts)));
    assert!(
        text.starts_with("reward `first` = in `score`: expected `score_async`"),
        "{text}"
    );
    // Without one that waits both ways are the same.
    let rewards = Rewards::new().with("exact", 1.0, exact);
    let scores = with_rollouts(|rollouts| {
        assert_eq!(
            block_on(rewards.score_async(rollouts)).unwrap(),
            rewards.score(rollouts).unwrap()
        );
        rewards.score(rollouts)
    });
    assert_eq!(scores.unwrap().totals, [1.0, 0.0, 0.0]);
}
