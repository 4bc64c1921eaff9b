//! What a training run will need of memory, from shapes alone.
//!
//! ```text
//! peak = max over the moments t of a step of  Σ_i size(tensor i) · [tensor i is alive at t]
//! ```
//!
//! A step is run without values, every tensor as its size ([`plan`]), for a decoder of the Llama family and full fine-tuning,
//! LoRA or QLoRA. What the operations keep for backward is what this crate's and Burn's operations keep; nothing in it was
//! fitted. `tests/alone/memory_plan` compares it with what an allocator counted.
//!
//! Sources: T. Dettmers et al., "QLoRA", <https://arxiv.org/abs/2305.14314>, section 3; V. Korthikanti et al., "Reducing activation
//! recomputation in large transformer models", <https://arxiv.org/abs/2205.05198>, section 4.
//!
//! ```
//! use burn_peft::memory::{Budget, Float, Method, ModelShape, Setup, plan, table};
//!
//! let shape = ModelShape::llama3_8b();
//! let setup = Setup::new(Method::QLora, Float::Bf16).with_batch(1, 1024);
//! let plan = plan(&shape, &setup)?;
//! println!("{plan}");
//! let fits = plan.fits(&[Budget::RTX_4090, Budget::A100_80]);
//! assert_eq!(fits, [Budget::RTX_4090, Budget::A100_80]);
//! println!("{}", table(&shape, &setup)?);
//! # Ok::<(), burn_peft::PeftError>(())
//! ```

mod block;
mod budget;
mod config;
mod ledger;
mod linear;
mod loss;
mod plan;
mod setup;
mod shape;
mod step;
mod table;
mod tensors;

pub use budget::{Budget, GB, GIB};
pub use config::MAX_MODEL_CONFIG_BYTES;
pub use ledger::{Moment, Part, Parts, Peak};
pub use plan::{Plan, plan};
pub use setup::{Float, Head, Loss, Method, Optimizer, Products, Recompute, Setup, Targets};
pub use shape::{MAX_DIMENSION, MAX_LAYERS, ModelShape, Projection};
pub use table::{Table, side_by_side, table};
