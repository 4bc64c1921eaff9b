//! The shapes that the tensors of a module have, in PyTorch's layout.

use super::adapter::LoraTensors;
use super::keys::Factor;

/// What the shapes of a module's tensors follow from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ModuleShape {
    pub d_in: usize,
    pub d_out: usize,
    /// Of a convolution: how many groups it has, and the sizes of its kernel.
    pub kernel: Option<(usize, Vec<usize>)>,
    /// How many experts have factors of the rank.
    pub experts: usize,
}

impl ModuleShape {
    /// A linear layer, or an embedding.
    pub fn matrix(d_in: usize, d_out: usize) -> Self {
        Self {
            d_in,
            d_out,
            kernel: None,
            experts: 1,
        }
    }

    /// As the factors have it, which a file alone cannot tell otherwise; every side at least 1.
    pub fn of(a: Option<&[usize]>, b: Option<&[usize]>) -> Self {
        let side = |shape: Option<&[usize]>, axis: usize| {
            let side = shape.and_then(|shape| shape.get(axis));
            side.copied().unwrap_or(1).max(1)
        };
        // More than any convolution has are no kernel, but a mistake to be shown.
        let kernel = a
            .and_then(|a| a.get(2..))
            .filter(|kernel| matches!(kernel.len(), 1..=3));
        Self {
            d_in: side(a, 1),
            d_out: side(b, 0),
            kernel: kernel.map(|kernel| {
                let groups = side(a, 0) / side(b, 1);
                let kernel = kernel.iter().map(|&size| size.max(1));
                (groups.max(1), kernel.collect())
            }),
            experts: 1,
        }
    }

    /// Of so many experts.
    pub fn of_experts(self, experts: usize) -> Self {
        Self { experts, ..self }
    }

    /// The shape of a tensor of rank `rank`.
    pub fn shape(&self, factor: Factor, rank: usize) -> Vec<usize> {
        let rank = rank.saturating_mul(self.experts);
        let axes = self.kernel.as_ref().map_or(0, |(_, kernel)| kernel.len());
        let point = |shape: [usize; 2]| [&shape[..], &vec![1; axes]].concat();
        match factor {
            Factor::A | Factor::EmbeddingA => {
                let kernel = self.kernel.iter().flat_map(|(_, kernel)| kernel);
                [rank, self.d_in]
                    .into_iter()
                    .chain(kernel.copied())
                    .collect()
            }
            Factor::B | Factor::EmbeddingB => {
                let groups = self.kernel.as_ref().map_or(1, |(groups, _)| *groups);
                point([self.d_out, rank / groups])
            }
            Factor::Bias => vec![self.d_out],
            Factor::Magnitude if axes > 0 => point([1, self.d_out]),
            Factor::Magnitude => vec![self.d_out],
        }
    }
}

impl LoraTensors {
    /// The sides of the module as its own factors have them.
    pub(super) fn module_shape(&self) -> ModuleShape {
        ModuleShape::of(Some(self.a.shape()), Some(self.b.shape()))
    }

    /// How many experts these factors of this rank are of; 1 where they are of none.
    pub(super) fn count_experts(&self, rank: usize) -> usize {
        match self.experts {
            true => count_experts(Some(self.a.shape()), rank),
            false => 1,
        }
    }
}

/// How many experts a factor `A [E·r, d_in]` is of; at least 1.
pub(super) fn count_experts(a: Option<&[usize]>, rank: usize) -> usize {
    let rows = a.and_then(|a| a.first()).copied().unwrap_or(0);
    (rows / rank.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_peft_s() {
        use Factor::{A, B, Bias, Magnitude};

        let linear = ModuleShape::of(Some(&[4, 8]), Some(&[6, 4]));
        assert_eq!(linear, ModuleShape::matrix(8, 6));
        assert_eq!([linear.shape(A, 4), linear.shape(B, 4)], [[4, 8], [6, 4]]);
        assert_eq!(
            [linear.shape(Bias, 4), linear.shape(Magnitude, 4)],
            [[6], [6]]
        );

        let grouped = ModuleShape::of(Some(&[6, 9, 3, 2]), Some(&[12, 2, 1, 1]));
        assert_eq!(grouped.kernel, Some((3, vec![3, 2])));
        assert_eq!(grouped.shape(A, 6), [6, 9, 3, 2]);
        assert_eq!(grouped.shape(B, 6), [12, 2, 1, 1]);
        assert_eq!(grouped.shape(Magnitude, 6), [1, 12, 1, 1]);
        assert_eq!(grouped.shape(Bias, 6), [12]);

        // Whatever a file says, there is no division by zero.
        let none = ModuleShape::of(Some(&[0, 0, 0]), Some(&[0, 0, 0]));
        assert_eq!(none.shape(B, 0), [1, 0, 1]);
    }
}
