//! Files of adapters on a model whose output head is its embedding.
//!
//! PEFT sees two modules there, and stores what it has of each. With `ensure_weight_tying` the head has tensors of its own too: the
//! embedding's copy once more, and of the embedding's factors `A_E`, `B_E` those of a linear layer, `A = B_Eᵀ` and `B = A_Eᵀ`. In Burn
//! the two are one parameter, and `src/model/tied.rs` has the table of what changes which.

use burn::tensor::TensorData;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor};
use super::config::is_input_embedding;
use super::elements::transposed;
use super::report::LoadReport;
use super::version::Version;
use crate::model::is_named;
use crate::{PeftError, Result};

/// The first version of PEFT whose `ensure_weight_tying` ties factors too.
const TIES_FACTORS: Version = Version(0, 19, 0);

/// What `ensure_weight_tying` of a file means on a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tied {
    /// It is not set: embedding and head are adapted apart.
    Apart,
    /// The head changes with the embedding.
    Together,
    /// It is set, but the model's head has a weight of its own.
    OwnHead,
    /// It is set beside DoRA, of which PEFT gives each of the two a magnitude.
    Magnitudes,
    /// It is set by a PEFT that left the head of an embedding with factors as it was.
    BeforeFactors,
}

impl Tied {
    /// Of `file`, on a model that has a head of its own or not.
    pub fn of(file: &AdapterFile, head: &str, has_own_head: bool) -> Self {
        if file.config.of_mlx && !has_own_head {
            return Self::Together;
        }
        if !file.config.ensure_weight_tying {
            return Self::Apart;
        }
        let embedding = file.input_embedding();
        let factors_of_head = || {
            let mut factors = file.tensors.iter();
            factors.any(|tensors| is_named(&tensors.path, head))
        };
        let is_old = || {
            let version = file.config.version();
            version.is_some_and(|version| version < TIES_FACTORS)
        };
        match embedding {
            _ if has_own_head => Self::OwnHead,
            Some(embedding) if embedding.magnitude.is_some() => Self::Magnitudes,
            Some(_) if is_old() && !factors_of_head() => Self::BeforeFactors,
            _ => Self::Together,
        }
    }

    /// Whether the head has the embedding's tensors once more, and changes with it.
    pub fn is_together(self) -> bool {
        self == Self::Together
    }

    /// Notes in `report` what a user should know of it.
    pub fn note(self, report: &mut LoadReport, head: &str, is_declared: bool) {
        let note = match self {
            Self::Apart | Self::Together => None,
            Self::OwnHead => Some(
                "the file ties the changes of embedding and head (`ensure_weight_tying`), but the model's head has a weight of its own: \
                 they are loaded apart, and train apart"
                    .into(),
            ),
            Self::Magnitudes => Some(
                "the file ties embedding and head (`ensure_weight_tying`) beside DoRA, whose magnitudes differ: the two are loaded apart, \
                 and train apart"
                    .into(),
            ),
            Self::BeforeFactors => Some(
                "`ensure_weight_tying` of PEFT before 0.19 did not tie factors: the head keeps the base, as it was trained".into(),
            ),
        };
        report.notes.extend(note);
        let of_head = format!("base_model.model.{head}.");
        let mut unexpected = report.unexpected.iter();
        if self != Self::OwnHead && !is_declared && unexpected.any(|key| key.starts_with(&of_head))
        {
            report.notes.push(format!(
                "the model has no `{head}`; if its output head is its embedding, `PeftModel::with_tied_head` says so, and `{head}` can be adapted"
            ));
        }
    }
}

/// The tensors that a tied head must have; none without `ensure_weight_tying`.
#[derive(Default)]
pub(super) struct TiedHead<'a> {
    copies: &'a [ParameterTensor],
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
            copies: &file.copies,
            factors: embedding.map(|embedding| [&embedding.b, &embedding.a].map(transposed)),
        }
    }

    /// Whether these are the embedding's factors once more.
    pub(super) fn has_factors(&self, tensors: &LoraTensors) -> bool {
        let plain = !tensors.embedding && tensors.magnitude.is_none();
        let factors = self.factors.as_ref().filter(|_| plain);
        factors.is_some_and(|[a, b]| tensors.a == *a && tensors.b == *b)
    }

    /// Whether this is another copy of the file once more.
    pub(super) fn has_copy(&self, copy: &ParameterTensor) -> bool {
        let mut others = self.copies.iter().filter(|other| other.path != copy.path);
        others.any(|other| other.data == copy.data)
    }
}

impl AdapterFile {
    /// Adds the tensors of the head at `head`, which shares the weight of an embedding. `copies` are the paths of the embeddings that have
    /// a copy.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] with DoRA.
    pub(super) fn tie_head(&mut self, head: &str, copies: &[String]) -> Result<()> {
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
        let of_embedding = |copy: &&ParameterTensor| copies.contains(&copy.path);
        let usual = |copy: &&ParameterTensor| {
            let module = copy.path.strip_suffix(".weight");
            module.is_some_and(is_input_embedding)
        };
        let mut copies = self.copies.iter().filter(of_embedding);
        let copy = copies.clone().find(usual).or_else(|| copies.next());
        if let Some(embedding) = copy {
            let (path, data) = (format!("{head}.weight"), embedding.data.clone());
            self.copies.push(ParameterTensor { path, data });
        }
        Ok(())
    }

    /// The factors of the input embedding: of the one called as PEFT calls it, or of the first there is.
    pub(super) fn input_embedding(&self) -> Option<&LoraTensors> {
        let embeddings = || self.tensors.iter().filter(|tensors| tensors.embedding);
        let usual = embeddings().find(|tensors| is_input_embedding(&tensors.path));
        usual.or_else(|| embeddings().next())
    }
}
