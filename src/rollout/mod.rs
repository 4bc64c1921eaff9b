//! Text sampled from a model as it trains, and what the text is worth.
//!
//! [`generate`] continues prompts by any model that implements [`Decode`]. There is no trainer here: the completions carry the
//! log-probabilities that a policy loss needs, and [`Rewards`] scores them.
//!
//! ```
//! # use burn::tensor::{Device, Tensor};
//! # use burn_peft::rollout::{Decode, Rewards, Rollout, Sampler, Stop, generate};
//! # struct Uniform;
//! # impl Decode for Uniform {
//! #     fn vocabulary(&self) -> usize { 16 }
//! #     fn prefill(&mut self, prompts: &[Vec<u32>], _: usize) -> Tensor<2> {
//! #         Tensor::zeros([prompts.len(), 16], &Device::default())
//! #     }
//! #     fn step(&mut self, tokens: &[u32], _: &[usize]) -> Tensor<2> {
//! #         Tensor::zeros([tokens.len(), 16], &Device::default())
//! #     }
//! # }
//! # fn main() -> burn_peft::Result<()> {
//! # let mut model = Uniform;
//! # let prompts = vec![vec![1, 2], vec![3]];
//! let (sampler, stop) = (Sampler::new(), Stop::new(24).with_tokens([0]));
//! // Four completions of each prompt; those of prompt `p` are the `p`-th four.
//! let completions = generate(&mut model, &prompts, 4, &sampler, &stop, 7)?;
//!
//! let rewards = Rewards::new().with("short", 1.0, |rollout: &Rollout| -(rollout.tokens().len() as f64));
//! let rollouts: Vec<_> = completions.iter().map(|own| Rollout::new(&prompts[own.prompt], own)).collect();
//! let scores = rewards.score(&rollouts)?;
//! assert_eq!(scores.totals.len(), 8);
//! # Ok(())
//! # }
//! ```
//!
//! # What is repeatable
//!
//! Each completion has random numbers of its own, which follow from [`Draws`] and its place alone. Sampling reads the logits of its own
//! row and nothing else. So a completion does not depend on the other prompts, on the number of copies, or on how prompts are spread
//! over calls, as long as the model's logits do not. On a CPU they do by rounding: few rows take other kernels than many, so a logit
//! differs in its last bits with the batch. A text changes only where a random number falls within that distance of a boundary between
//! two tokens, or where two tokens are the best alike; that is rare in f32, and less rare in bf16.

mod completion;
mod decode;
mod distribution;
mod draws;
mod generate;
mod reward;
mod sampler;
mod scores;
mod stop;
mod text;

pub use completion::{Completion, Finish};
pub use decode::Decode;
pub use distribution::Distribution;
pub use draws::Draws;
pub use generate::generate;
pub use reward::{AsyncReward, BoxError, Pending, Reward, Rewards, Rollout, Score};
pub use sampler::Sampler;
pub use scores::{RewardColumn, RewardSummary, Scores};
pub use stop::Stop;
