//! Which adapters of a model are in use.

use std::fmt;

/// The adapters in use: a weighted sum of changes, or one choice for every row of a batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Active {
    /// `x·W + b + Σ_i w_i·Δ_i(x)`: adapters with their weights `w_i`; none leave the base as it is. Those of them that are
    /// trainable train.
    Sum(Vec<(String, f64)>),
    /// Row `i` of a batch has the adapter at place `i`, or none. None of them trains.
    Rows(Vec<Option<String>>),
}

impl Active {
    pub(super) fn none() -> Self {
        Self::Sum(Vec::new())
    }

    pub(super) fn one(name: &str) -> Self {
        Self::Sum(vec![(name.into(), 1.0)])
    }

    /// Names of the adapters in use, each once.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Self::Sum(adapters) => adapters.iter().map(|(name, _)| name.as_str()).collect(),
            Self::Rows(rows) => {
                let mut names: Vec<&str> = rows.iter().flatten().map(String::as_str).collect();
                names.sort_unstable();
                names.dedup();
                names
            }
        }
    }

    /// Whether the adapter `name` is in use.
    pub fn uses(&self, name: &str) -> bool {
        match self {
            Self::Sum(_) => self.sums(name),
            Self::Rows(rows) => rows.iter().any(|row| row.as_deref() == Some(name)),
        }
    }

    /// Whether the adapter `name` is one of a sum: these can train.
    pub(super) fn sums(&self, name: &str) -> bool {
        match self {
            Self::Sum(adapters) => adapters.iter().any(|(adapter, _)| adapter == name),
            Self::Rows(_) => false,
        }
    }

    /// The rows that have the adapter `name`.
    pub(super) fn rows_of(&self, name: &str) -> Vec<usize> {
        match self {
            Self::Sum(_) => Vec::new(),
            Self::Rows(rows) => {
                let rows = rows.iter().enumerate();
                rows.filter_map(|(row, adapter)| (adapter.as_deref() == Some(name)).then_some(row))
                    .collect()
            }
        }
    }

    /// Gives an adapter another name.
    pub(super) fn rename(&mut self, name: &str, new_name: &str) {
        match self {
            Self::Sum(adapters) => {
                for (adapter, _) in adapters.iter_mut().filter(|(adapter, _)| adapter == name) {
                    *adapter = new_name.into();
                }
            }
            Self::Rows(rows) => {
                for row in rows.iter_mut().flatten().filter(|row| *row == name) {
                    *row = new_name.into();
                }
            }
        }
    }

    /// Takes those that `keep` does not name out of use.
    pub(super) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        match self {
            Self::Sum(adapters) => adapters.retain(|(name, _)| keep(name)),
            Self::Rows(rows) => {
                for row in rows {
                    *row = row.take().filter(|name| keep(name));
                }
            }
        }
    }
}

impl fmt::Display for Active {
    /// For instance `one + 0.5·two`; `none`; `rows: one, -, two`.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Sum(adapters) if adapters.is_empty() => f.write_str("none"),
            Self::Sum(adapters) => {
                let adapters = adapters.iter().map(|(name, weight)| match weight {
                    1.0 => name.clone(),
                    weight => format!("{weight}·{name}"),
                });
                f.write_str(&adapters.collect::<Vec<_>>().join(" + "))
            }
            Self::Rows(rows) => {
                let rows = rows.iter().map(|row| row.as_deref().unwrap_or("-"));
                write!(f, "rows: {}", rows.collect::<Vec<_>>().join(", "))
            }
        }
    }
}
