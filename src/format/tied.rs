//! What PEFT writes a second time for an output head that is the model's embedding, with `ensure_weight_tying`.
//!
//! In PEFT such a head has tensors of its own: the embedding's copy once more, and of the embedding's factors `A_E`, `B_E` those of
//! a linear layer, `A = B_Eᵀ` and `B = A_Eᵀ`. In Burn the two are one parameter.

use burn::tensor::TensorData;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor};
use super::config::is_input_embedding;
use super::elements::transposed;
use crate::{PeftError, Result};

/// The tensors that a tied head must have; none without `ensure_weight_tying`.
#[derive(Default)]
pub(super) struct TiedHead<'a> {
    copy: Option<&'a ParameterTensor>,
    factors: Option<[TensorData; 2]>,
}

impl<'a> TiedHead<'a> {
    /// As the embedding in `file` has it.
    pub(super) fn of(file: &'a AdapterFile) -> Self {
        if !file.config.ensure_weight_tying {
            return Self::default();
        }
        let embedding = file.input_embedding().filter(|tensors| {
            tensors.magnitude.is_none() && tensors.a.rank() == 2 && tensors.b.rank() == 2
        });
        Self {
            copy: file.copy_of_input_embedding(),
            factors: embedding.map(|embedding| [&embedding.b, &embedding.a].map(transposed)),
        }
    }

    /// Whether these are the embedding's factors once more.
    pub(super) fn has_factors(&self, tensors: &LoraTensors) -> bool {
        let plain = !tensors.embedding && tensors.magnitude.is_none();
        let factors = self.factors.as_ref().filter(|_| plain);
        factors.is_some_and(|[a, b]| tensors.a == *a && tensors.b == *b)
    }

    /// Whether this is the embedding's copy once more.
    pub(super) fn has_copy(&self, copy: &ParameterTensor) -> bool {
        let embedding = self.copy.filter(|embedding| embedding.path != copy.path);
        embedding.is_some_and(|embedding| embedding.data == copy.data)
    }
}

impl AdapterFile {
    /// Adds the tensors of the head at `head`, which is the model's embedding.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] with DoRA.
    pub(super) fn tie_head(&mut self, head: &str) -> Result<()> {
        self.config.ensure_weight_tying = true;
        if let Some(embedding) = self.input_embedding() {
            if embedding.magnitude.is_some() {
                return Err(PeftError::config(
                    "ensure_weight_tying",
                    "true",
                    "false with DoRA, of which PEFT gives a tied head a magnitude of its own",
                ));
            }
            let [a, b] = [&embedding.b, &embedding.a].map(transposed);
            self.tensors.push(LoraTensors::new(head, a, b));
        }
        if let Some(embedding) = self.copy_of_input_embedding() {
            let (path, data) = (format!("{head}.weight"), embedding.data.clone());
            self.copies.push(ParameterTensor { path, data });
        }
        Ok(())
    }

    /// The factors of the input embedding: of the one called as PEFT calls it, or of the first there is.
    fn input_embedding(&self) -> Option<&LoraTensors> {
        let embeddings = || self.tensors.iter().filter(|tensors| tensors.embedding);
        let usual = embeddings().find(|tensors| is_input_embedding(&tensors.path));
        usual.or_else(|| embeddings().next())
    }

    fn copy_of_input_embedding(&self) -> Option<&ParameterTensor> {
        self.copies.iter().find(|copy| {
            let module = copy.path.strip_suffix(".weight");
            module.is_some_and(is_input_embedding)
        })
    }
}
