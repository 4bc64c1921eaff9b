//! The tests of what alignment needs: objectives, rollouts, and the data for both.

mod data;
mod objective;
mod rollout;
