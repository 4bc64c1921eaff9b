//! An output head that shares the weight of an embedding, and which of the two an adapter changes.
//!
//! PEFT sees two modules there, the embedding and the head, and adapts each by itself. Burn has one parameter `E [tokens, features]`, which
//! the lookup reads as `E[t]` and the head as `x·Eᵀ`. So every change of such a parameter says which of the two it is for
//! ([`TiedPart`]); PEFT 0.21.2 decides that as this table says, and so does this crate:
//!
//! | the adapter has | `ensure_weight_tying` | lookup | head |
//! |---|---|---|---|
//! | LoRA, DoRA or a copy of the embedding | false | changed | base |
//! | LoRA or a copy of the embedding | true | changed | changed alike |
//! | LoRA, DoRA or a copy of the head | false | base | changed |
//! | trained rows (tokens) of the embedding | either | changed | changed alike |
//! | trained rows of the head | either | base | changed |
//! | other trained rows of each | false | changed by its own | changed by its own |
//! | base values that PEFT stored | either | replaced | replaced alike |
//!
//! What changes the head alone is a change of a linear layer with the weight `Eᵀ [features, tokens]`: it has a linear layer's factors,
//! dropout and magnitude, and the path of the head. No parameter of the model has that path, so [`PeftModel::head_site`] makes a site
//! for it.

use std::sync::atomic::Ordering;

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};

use super::active::Active;
use super::config::PeftConfig;
use super::parameters::is_named;
use super::peft_model::PeftModel;
use super::traverse::{See, Site, as_matrix, walk};
use super::weight::{NamedChange, PeftWeight};
use crate::adapter::{
    Change, FrozenMap, Lora, TrainedCopy, TrainedRows, cast, forward_rows, forward_sum, merge_sum,
};
use crate::fused::frozen_linear;
use crate::layer::{DenseMap, LayerKind, attend_low_rank};
use crate::{PeftError, Result};

/// Which use of an embedding a change is for, where the output head shares the embedding's weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TiedPart {
    /// The parameter as a whole: the lookup and, if a head shares it, the head.
    #[default]
    Both,
    /// The lookup of tokens alone.
    Lookup,
    /// The output head alone.
    Head,
}

/// How an output head reads the embedding whose weight it shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum HeadRead {
    /// Nothing was said: there may be no such head.
    #[default]
    Unknown,
    /// There is one; how it reads is not known.
    Shared,
    /// By `attend_peft` or the head's loss, and the lookup by `forward_peft`.
    Attended,
    /// By `weight.val()`, as the lookup does.
    Composed,
}

/// The embedding that is known to be the model's output head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SharedHead {
    /// Its path, or the end of it.
    pub embedding: String,
    pub read: HeadRead,
}

impl<M: Module> PeftModel<M> {
    /// Says that the output head of the model is the embedding at this path, or at a path that ends so: the head is computed by
    /// [`attend_peft`](super::TiedHead::attend_peft) or [`sft_head_loss`](crate::objective::sft_head_loss), and the lookup by
    /// [`forward_peft`](super::PeftForward::forward_peft).
    ///
    /// Adapters can then change the head alone, under the name that [`with_head`](Self::with_head) gives it, as in PEFT: a target, a
    /// module to save, or the module of trained tokens. An adapter that changes the lookup alone leaves the head as it is in any case.
    pub fn with_tied_head(self, embedding: impl Into<String>) -> Self {
        self.share_head(embedding.into(), HeadRead::Attended)
    }

    /// Says that the output head of the model is the embedding at this path, or at a path that ends so, and that the model computes it
    /// from `embedding.weight.val()`.
    ///
    /// Such a model cannot tell the head from the lookup, so adapters that change only one of the two are refused when they are added or
    /// loaded: LoRA or a copy of the embedding needs
    /// [`ensure_weight_tying`](super::PeftConfig::ensure_weight_tying). To use them, call
    /// [`attend_peft`](super::TiedHead::attend_peft) in the model's head and declare it by [`with_tied_head`](Self::with_tied_head).
    pub fn with_composed_tied_head(self, embedding: impl Into<String>) -> Self {
        self.share_head(embedding.into(), HeadRead::Composed)
    }

    fn share_head(mut self, embedding: String, read: HeadRead) -> Self {
        self.shared_head = Some(SharedHead { embedding, read });
        self.tell_states();
        self
    }

    /// Notes that the output head shares the weight of this embedding, unless more was said.
    pub(crate) fn note_shared_head(&mut self, embedding: &str) {
        if self.shared_head.is_none() {
            self.shared_head = Some(SharedHead {
                embedding: embedding.into(),
                read: HeadRead::Shared,
            });
            self.tell_states();
        }
    }

    /// Tells what is attached already how the head reads it.
    fn tell_states(&mut self) {
        let sites = self.sites();
        let reads: Vec<_> = sites.iter().map(|site| self.head_read(site)).collect();
        let states = sites.into_iter().zip(reads).filter_map(|(site, read)| {
            let mut state = site.state.filter(|state| state.head != read)?;
            state.head = read;
            Some((site.path, state))
        });
        let states = states.collect();
        self.update(states);
    }

    /// How the output head reads the parameter at `site`.
    pub(super) fn head_read(&self, site: &Site) -> HeadRead {
        match &self.shared_head {
            Some(head) if is_shared(site, head) => head.read,
            _ => HeadRead::Unknown,
        }
    }

    /// Path of the weight of the output head that is an embedding.
    pub(super) fn head_weight(&self) -> String {
        format!("{}.weight", self.head())
    }

    /// The output head that shares an embedding's weight, as the site of a linear layer of the weight `Eᵀ`. Its state has what
    /// changes the head alone. `sites` are those of the model.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] where the embedding that was declared does not exist, or the model has a head of its own beside it.
    pub(super) fn head_site(&self, sites: &[Site]) -> Result<Option<Site>> {
        let Some(head) = &self.shared_head else {
            return Ok(None);
        };
        let Some(site) = sites.iter().find(|site| is_shared(site, head)) else {
            let embeddings = sites.iter().filter(|site| is_embedding(site));
            let embeddings: Vec<_> = embeddings.map(Site::module).collect();
            return Err(PeftError::config(
                "tied head",
                format!("the embedding `{}`", head.embedding),
                format!("the path of one of the model's embeddings, or its end: {embeddings:?}"),
            ));
        };
        if let Some(own) = self.head_of(sites) {
            return Err(PeftError::config(
                "tied head",
                format!("the embedding `{}`", site.module()),
                format!(
                    "no tied head beside the model's own head `{own}`; `with_head` gives the tied one another name"
                ),
            ));
        }
        let [tokens, features] = site.dims();
        let mut state = site.state.clone();
        if let Some(state) = &mut state {
            state.adapters.retain(|own| own.part == TiedPart::Head);
            for own in &mut state.adapters {
                own.part = TiedPart::Both;
            }
        }
        Ok(Some(Site {
            path: self.head_weight(),
            shape: vec![features, tokens],
            dtype: site.dtype,
            device: self.device_of(site),
            trainable: false,
            layer: Some(LayerKind::Linear),
            holder: "Linear".into(),
            state,
            foreign: site.foreign.clone(),
            foreign_params: 0,
        }))
    }

    /// The sites of the model and of an output head that shares an embedding's weight.
    ///
    /// # Errors
    ///
    /// As [`head_site`](Self::head_site).
    pub(super) fn sites_with_head(&self) -> Result<Vec<Site>> {
        let mut sites = self.sites();
        let head = self.head_site(&sites)?;
        sites.extend(head);
        Ok(sites)
    }

    /// Shows the parameters of the model, and the weight `Eᵀ` of an output head that shares an embedding's, if `see` wants that.
    pub(super) fn walk_with_head(&self, see: &mut (impl See + Wanted)) {
        let head = self.head_weight();
        let sites = match see.wants(&head) {
            true => self.sites(),
            false => Vec::new(),
        };
        match self.embedding_of_head(&head, &sites) {
            None => walk(self.module(), see),
            Some(embedding) => walk(
                self.module(),
                &mut WithHead {
                    see,
                    embedding,
                    head,
                },
            ),
        }
    }

    /// Whether an adapter of `config` may change this part of the parameter at `site`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for DoRA that is to change an embedding and its head alike, and for one part alone where the model's
    /// head cannot be told from the lookup.
    pub(super) fn check_part(
        &self,
        site: &Site,
        change: &Change,
        part: TiedPart,
        config: &PeftConfig,
    ) -> Result<()> {
        if !is_embedding(site) {
            return Ok(());
        }
        let has_magnitude = change.lora().is_some_and(|lora| lora.magnitude.is_some());
        if config.ensure_weight_tying && has_magnitude && part == TiedPart::Both {
            return Err(PeftError::config(
                "ensure_weight_tying",
                "true",
                format!(
                    "false with DoRA on `{}`: PEFT gives a tied head a magnitude of its own",
                    site.module()
                ),
            ));
        }
        if self.head_read(site) == HeadRead::Composed && part != TiedPart::Both {
            return Err(PeftError::config(
                format!("the change of `{}`", site.module()),
                match part {
                    TiedPart::Head => "of the output head alone",
                    _ => "of the lookup of tokens alone, without `ensure_weight_tying`",
                },
                "one of both, as the model reads both from `weight.val()`: set `ensure_weight_tying`, or call `attend_peft` in the \
                 model's head and declare it by `PeftModel::with_tied_head`",
            ));
        }
        Ok(())
    }

    /// What cannot be known of a tied head that the adapter `name` depends on.
    pub(crate) fn tied_notes(&self, name: &str) -> Vec<String> {
        let sites = self.sites();
        // With a head of its own, the lookup is all that reads an embedding.
        if self.head_of(&sites).is_some() {
            return Vec::new();
        }
        let lookup_only = |site: &&Site| {
            let own = site.state.iter().flat_map(|state| &state.adapters);
            let mut own = own.filter(|own| own.name == name);
            self.head_read(site) == HeadRead::Unknown && own.any(|own| own.part == TiedPart::Lookup)
        };
        let sites = sites.iter().filter(lookup_only);
        sites
            .map(|site| {
                format!(
                    "adapter `{name}` changes the lookup of `{}` alone, as `ensure_weight_tying` is false; if the output head shares \
                     that weight, it must be computed by `attend_peft` or `sft_head_loss`, and `PeftModel::with_tied_head` says so",
                    site.module()
                )
            })
            .collect()
    }

    /// Whether these adapters change an embedding and its head alike, or the lookup alone.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] where one does the former and another the latter: no single adapter does both.
    pub(super) fn common_tying<'a>(&self, adapters: impl Iterator<Item = &'a str>) -> Result<bool> {
        let embeddings = self.sites();
        let embeddings: Vec<_> = embeddings
            .iter()
            .filter(|site| is_embedding(site))
            .collect();
        let mut common: Option<(&str, bool)> = None;
        for name in adapters {
            let states = embeddings.iter().filter_map(|site| site.state.as_ref());
            let mut own = states.flat_map(|state| state.changes(name));
            if !own.any(|change| change.lora().is_some()) {
                continue;
            }
            let tied = self.config(name)?.ensure_weight_tying;
            match common {
                Some((other, of_other)) if of_other != tied => {
                    return Err(PeftError::config(
                        format!("ensure_weight_tying of adapter `{name}`"),
                        tied,
                        format!(
                            "{of_other}, as adapter `{other}` has it: one adapter cannot do both"
                        ),
                    ));
                }
                _ => common = Some((name, tied)),
            }
        }
        Ok(common.is_some_and(|(_, tied)| tied))
    }

    /// The path of the embedding's weight that an output head was declared to share.
    pub(crate) fn tied_embedding(&self) -> Option<String> {
        self.embedding_of_head(&self.head_weight(), &self.sites())
    }

    /// The path of the embedding whose weight the output head of the weight `head` shares, if there is no such parameter among the
    /// `sites` of the model.
    pub(super) fn embedding_of_head(&self, head: &str, sites: &[Site]) -> Option<String> {
        let shared = self.shared_head.as_ref()?;
        let is_own = sites.iter().any(|site| site.path == head);
        let site = sites.iter().find(|site| is_shared(site, shared))?;
        (head == self.head_weight() && !is_own).then(|| site.path.clone())
    }
}

/// A visitor that wants some parameters only.
pub(super) trait Wanted {
    fn wants(&self, path: &str) -> bool;
}

/// Shows the weight of the head after the embedding's.
struct WithHead<'a, S> {
    see: &'a mut S,
    embedding: String,
    head: String,
}

impl<S: See> See for WithHead<'_, S> {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        self.see.see(path, param);
        if path == self.embedding {
            let head = as_matrix(param).base().transpose();
            self.see.see(&self.head, &Param::from_tensor(head));
        }
    }
}

/// What the change of the parameter at `site` by an adapter is for. `rows_of_head` says whether the adapter has trained rows of the head
/// alone.
pub(super) fn part_of(
    site: &Site,
    change: &Change,
    ensure_weight_tying: bool,
    rows_of_head: bool,
) -> TiedPart {
    if !is_embedding(site) || change.is_base() {
        return TiedPart::Both;
    }
    let lookup_only = match change {
        Change::Rows(_) => rows_of_head,
        _ => !ensure_weight_tying,
    };
    match lookup_only {
        true => TiedPart::Lookup,
        false => TiedPart::Both,
    }
}

fn is_embedding(site: &Site) -> bool {
    site.layer == Some(LayerKind::Embedding)
}

fn is_shared(site: &Site, head: &SharedHead) -> bool {
    is_embedding(site) && is_named(site.module(), &head.embedding)
}

/// The changes of an output head that shares the weight `E [tokens, features]` of an embedding, each with its weight.
#[derive(Default)]
pub(super) struct HeadChanges<'a> {
    /// Base values that adapters bring with them, of `E`.
    frozen: Vec<Own<'a>>,
    /// Trained values of all of `E`, or of all of `Eᵀ`.
    copies: Vec<Own<'a>>,
    /// Trained rows.
    pub rows: Vec<(&'a TrainedRows, f64)>,
    /// Low-rank changes of `E`, by which the lookup changes too.
    pub both: Vec<(&'a Lora, f64)>,
    /// Low-rank changes of `Eᵀ`.
    pub head: Vec<(&'a Lora, f64)>,
}

/// Values of an adapter's own, and whether they are those of `Eᵀ`.
struct Own<'a> {
    copy: &'a TrainedCopy,
    turned: bool,
    weight: f64,
}

impl Own<'_> {
    /// In the layout of `E`.
    fn value(&self) -> Tensor<2> {
        match self.turned {
            true => self.copy.value::<2>().transpose(),
            false => self.copy.value(),
        }
    }
}

impl<'a> HeadChanges<'a> {
    fn add(&mut self, own: &'a NamedChange, weight: f64) {
        let turned = match own.part {
            TiedPart::Lookup => return,
            TiedPart::Head => true,
            TiedPart::Both => false,
        };
        match &own.change {
            Change::Lora(lora) if turned => self.head.push((lora, weight)),
            Change::Lora(lora) => self.both.push((lora, weight)),
            Change::Rows(rows) => self.rows.push((rows, weight)),
            Change::Copy(copy) => {
                let list = match copy.is_frozen() {
                    true => &mut self.frozen,
                    false => &mut self.copies,
                };
                list.push(Own {
                    copy,
                    turned,
                    weight,
                });
            }
        }
    }

    /// `E` with the values that adapters have of their own for all of it, in `dtype`.
    pub fn base(&self, base: Tensor<2>, dtype: FloatDType) -> Tensor<2> {
        match &self.copies[..] {
            [] => self.frozen(base, dtype),
            [own] if own.weight == 1.0 => cast(own.value(), dtype),
            copies => cast(sum(self.frozen(base, dtype), copies), dtype),
        }
    }

    /// `E` with the base values that adapters bring with them: what trained values and rows take the place of.
    pub fn frozen(&self, base: Tensor<2>, dtype: FloatDType) -> Tensor<2> {
        match &self.frozen[..] {
            [] => base,
            [own] if own.weight == 1.0 => cast(own.value(), dtype),
            frozen => cast(sum(base, frozen), dtype),
        }
    }

    /// Whether a low-rank change has a magnitude.
    pub fn has_magnitudes(&self) -> bool {
        let mut all = self.both.iter().chain(&self.head);
        all.any(|(lora, _)| lora.magnitude.is_some())
    }

    /// Whether a low-rank change drops a part of this input, or has a bias of its `B`.
    pub fn depends_on_input<const D: usize>(&self, x: &Tensor<D>) -> bool {
        let mut all = self.both.iter().chain(&self.head);
        all.any(|(lora, _)| lora.drops(x) || lora.bias.is_some())
    }
}

/// `E + Σ_i w_i·(V_i - E)`, in f32.
fn sum(base: Tensor<2>, own: &[Own]) -> Tensor<2> {
    let base = cast(base, FloatDType::F32);
    own.iter().fold(base.clone(), |sum, own| {
        let value = cast(own.value(), FloatDType::F32);
        sum + (value - base.clone()).mul_scalar(own.weight)
    })
}

impl PeftWeight {
    /// Whether the lookup of an embedding and a head that shares it read different values.
    pub(super) fn is_split(&self) -> bool {
        let split = |own: &NamedChange| own.part != TiedPart::Both && self.active.uses(&own.name);
        self.enabled && self.adapters.iter().any(split)
    }

    /// Whether the output head is known to read this weight.
    pub(super) fn is_head(&self) -> bool {
        self.head != HeadRead::Unknown || self.attended.load(Ordering::Relaxed)
    }

    /// Notes that the output head has read this weight, without forming another.
    pub(super) fn note_attended(&self) {
        self.attended.store(true, Ordering::Relaxed);
        if self.is_changed() {
            self.read_factored();
        }
    }

    /// # Panics
    ///
    /// Panics for an embedding that the output head is known to share, where adapters in use change only the head or only the lookup:
    /// no single dense weight is what both read.
    pub(super) fn refuse_to_compose_tied(&self) {
        assert!(
            self.head == HeadRead::Unknown || !self.is_split(),
            "the output head shares this embedding, and an adapter changes only one of the two: call `forward_peft` for the lookup \
             and `attend_peft` (or `sft_head_loss`) for the head, or add the adapter with `ensure_weight_tying`"
        );
    }

    /// The changes of the head, or `None` where the rows of a batch have adapters of their own.
    pub(super) fn head_changes(&self) -> Option<HeadChanges<'_>> {
        let Active::Sum(active) = &self.active else {
            return None;
        };
        let mut changes = HeadChanges::default();
        for (name, weight) in active.iter().filter(|_| self.enabled) {
            for own in self.adapters.iter().filter(|own| own.name == *name) {
                changes.add(own, *weight);
            }
        }
        Some(changes)
    }

    /// The effective head `E [tokens, features]` in f32, differentiable in what trains.
    ///
    /// # Panics
    ///
    /// Panics where the rows of a batch have adapters of their own.
    pub(super) fn effective_head(&self, base: Tensor<2>) -> Tensor<2> {
        let changes = self.head_changes().expect("one weight for all rows");
        let wide = |tensor| cast(tensor, FloatDType::F32);
        let base = self.base(base);
        let old = wide(changes.frozen(base.clone(), FloatDType::F32));
        let base = wide(changes.base(base, FloatDType::F32));
        let alone = changes.rows.len() == 1 && changes.copies.is_empty();
        let with_rows = changes.rows.iter().fold(base, |sum, (rows, weight)| {
            let own = match rows.is_of_head() {
                true => rows.replace(old.clone().transpose()).transpose(),
                false => rows.replace(old.clone()),
            };
            match alone && *weight == 1.0 {
                true => own,
                false => sum + (own - old.clone()).mul_scalar(*weight),
            }
        });
        let both = merge_sum(with_rows, &changes.both);
        merge_sum(both.transpose(), &changes.head).transpose()
    }

    /// `x·E'ᵀ` with the `E'` of the head: `[..., features] -> [..., tokens]`. `base` is `E`.
    ///
    /// # Panics
    ///
    /// Panics where the rows of a batch have adapters of their own that change the lookup too.
    pub(super) fn attend<const D: usize>(&self, x: Tensor<D>, base: Tensor<2>) -> Tensor<D> {
        self.note_attended();
        let Some(changes) = self.head_changes() else {
            return self.attend_rows(x, base);
        };
        let dtype = self.effective_dtype(base.dtype());
        if changes
            .both
            .iter()
            .any(|(lora, _)| lora.magnitude.is_some())
        {
            let weight = cast(self.effective_head(base), dtype);
            return frozen_linear(x, weight.transpose());
        }
        let old = changes.frozen(base.clone(), dtype);
        let turned = changes.base(base, dtype).transpose();
        let mut y = match changes.has_magnitudes() {
            true => {
                let map = DenseMap {
                    weight: turned,
                    bias: None,
                };
                forward_sum(x.clone(), &map, &changes.head)
            }
            false => {
                let y = frozen_linear(x.clone(), turned);
                changes.head.iter().fold(y, |y, (lora, weight)| {
                    let change = lora.delta(x.clone()).mul_scalar(*weight);
                    let change = cast(change, y.dtype().into());
                    y + change
                })
            }
        };
        for (lora, factor) in &changes.both {
            let (a, b) = lora.factors();
            // As PEFT drops the input of its head.
            let dropped = lora.dropout.forward(x.clone());
            y = y + attend_low_rank(&dropped, a, b, factor * lora.scale());
        }
        let rows = changes.rows.iter();
        rows.fold(y, |y, (rows, factor)| rows.attend(&x, y, &old, *factor))
    }

    /// As [`attend`](Self::attend), with adapters of their own for the rows of a batch.
    fn attend_rows<const D: usize>(&self, x: Tensor<D>, base: Tensor<2>) -> Tensor<D> {
        let of_both = |own: &NamedChange| {
            own.part == TiedPart::Both && own.change.lora().is_some() && self.active.uses(&own.name)
        };
        assert!(
            !self.enabled || !self.adapters.iter().any(of_both),
            "rows of a batch under adapters that change embedding and head alike have no one head"
        );
        let map = DenseMap {
            weight: base.transpose(),
            bias: None,
        };
        match self.enabled {
            true => {
                let groups = self.row_groups_of(x.dims()[0], |part| part == TiedPart::Head);
                forward_rows(x, &map, &groups)
            }
            false => map.apply(x),
        }
    }
}
