//! Bytes that would be live: a run of nothing but sizes.
//!
//! A tensor here is its size and what it is for. Handles of it are counted as those of Burn's CPU backend are: clones share
//! it, and when the last handle goes, its bytes are free. So the code that plans a step reads as the code that runs it, and
//! the peak is the maximum over its moments.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

/// What bytes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Dense weights, and the codes of packed ones.
    Weights,
    /// Scales of packed weights.
    Scales,
    /// Factors of adapters.
    Adapters,
    /// Gradients of what is trained.
    Gradients,
    /// The optimiser's state.
    Optimizer,
    /// What the forward pass keeps for the backward pass, but for logits.
    Activations,
    /// Logits.
    Logits,
    /// What lives within one pass: results on their way, gradients of activations, copies.
    Transients,
}

impl Part {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 8] = [
        Self::Weights,
        Self::Scales,
        Self::Adapters,
        Self::Gradients,
        Self::Optimizer,
        Self::Activations,
        Self::Logits,
        Self::Transients,
    ];

    /// As a heading.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Scales => "scales",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimiser state",
            Self::Activations => "activations kept",
            Self::Logits => "logits",
            Self::Transients => "transients",
        }
    }
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts([u128; Part::ALL.len()]);

impl Parts {
    /// Those of one part.
    pub fn of(&self, part: Part) -> u128 {
        self.0[part as usize]
    }

    /// All together.
    pub fn total(&self) -> u128 {
        self.0.iter().sum()
    }

    pub(super) fn add(&mut self, part: Part, bytes: u128) {
        self.0[part as usize] += bytes;
    }
}

/// When in a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before the step.
    Start,
    /// In the forward pass of the embedding.
    ForwardEmbedding,
    /// In the forward pass of a block, counted from 0.
    Forward(u64),
    /// In the forward pass of the last norm and the head.
    ForwardHead,
    /// In the loss, forward and backward.
    Loss,
    /// In the backward pass of the head and the last norm.
    BackwardHead,
    /// In the backward pass of a block, its second forward pass included if it has one.
    Backward(u64),
    /// In the backward pass of the embedding.
    BackwardEmbedding,
    /// In the optimiser's step.
    Optimizer,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Start => f.write_str("before the step"),
            Self::ForwardEmbedding => f.write_str("forward of the embedding"),
            Self::Forward(block) => write!(f, "forward of block {block}"),
            Self::ForwardHead => f.write_str("forward of the head"),
            Self::Loss => f.write_str("the loss"),
            Self::BackwardHead => f.write_str("backward of the head"),
            Self::Backward(block) => write!(f, "backward of block {block}"),
            Self::BackwardEmbedding => f.write_str("backward of the embedding"),
            Self::Optimizer => f.write_str("the optimiser's step"),
        }
    }
}

/// The most that was live at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peak {
    /// Bytes by part.
    pub parts: Parts,
    /// When.
    pub moment: Moment,
}

/// A tensor: a handle of its bytes.
#[derive(Clone)]
pub(super) struct Tensor(#[allow(dead_code)] Rc<Held>);

struct Held {
    part: Part,
    bytes: u128,
    state: Rc<RefCell<State>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.state.borrow_mut().live.0[self.part as usize] -= self.bytes;
    }
}

struct State {
    live: Parts,
    /// The most of each part, each at its own moment.
    most: Parts,
    /// Of [`Part::Transients`], the largest single tensor.
    largest: u128,
    moment: Moment,
    peak: Peak,
}

/// What is live, and the most that was.
#[derive(Clone)]
pub(super) struct Ledger(Rc<RefCell<State>>);

impl Ledger {
    pub fn new() -> Self {
        let peak = Peak {
            parts: Parts::default(),
            moment: Moment::Start,
        };
        Self(Rc::new(RefCell::new(State {
            live: Parts::default(),
            most: Parts::default(),
            largest: 0,
            moment: Moment::Start,
            peak,
        })))
    }

    pub fn tensor(&self, part: Part, bytes: u128) -> Tensor {
        let mut state = self.0.borrow_mut();
        state.live.add(part, bytes);
        state.most.0[part as usize] = state.most.of(part).max(state.live.of(part));
        if part == Part::Transients {
            state.largest = state.largest.max(bytes);
        }
        if state.live.total() > state.peak.parts.total() {
            state.peak = Peak {
                parts: state.live,
                moment: state.moment,
            };
        }
        Tensor(Rc::new(Held {
            part,
            bytes,
            state: self.0.clone(),
        }))
    }

    pub fn begin(&self, moment: Moment) {
        self.0.borrow_mut().moment = moment;
    }

    pub fn live(&self) -> Parts {
        self.0.borrow().live
    }

    pub fn most(&self) -> Parts {
        self.0.borrow().most
    }

    pub fn largest_transient(&self) -> u128 {
        self.0.borrow().largest
    }

    pub fn peak(&self) -> Peak {
        self.0.borrow().peak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_handle_frees_and_the_peak_knows_its_moment() {
        let ledger = Ledger::new();
        let weights = ledger.tensor(Part::Weights, 100);
        ledger.begin(Moment::Forward(3));
        let x = ledger.tensor(Part::Activations, 10);
        let handle = x.clone();
        drop(x);
        assert_eq!(ledger.live().total(), 110);
        drop(ledger.tensor(Part::Transients, 7));
        drop(handle);
        ledger.begin(Moment::Optimizer);
        drop(ledger.tensor(Part::Transients, 5));
        assert_eq!(ledger.live().of(Part::Weights), 100);
        let peak = ledger.peak();
        assert_eq!((peak.moment, peak.parts.total()), (Moment::Forward(3), 117));
        assert_eq!(peak.parts.of(Part::Activations), 10);
        assert_eq!(ledger.largest_transient(), 7);
        drop(weights);
        assert_eq!(ledger.live(), Parts::default());
    }
}
