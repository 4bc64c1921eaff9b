//! How many groups the convolutions of a model have.
//!
//! Burn keeps that number out of what visitors and mappers see. A derived `Debug` shows it: `Conv2d { weight: .., groups: 2, .. }`,
//! layer after layer in the order in which a visitor meets them. It is used only where layers and text agree one by one.

use std::collections::HashMap;
use std::fmt::Debug;

use super::traverse::Site;
use crate::layer::LayerKind;

/// The groups of the convolutions at these sites, by the paths of their weights; empty where they are not shown.
pub(super) fn shown_groups(module: &impl Debug, sites: &[Site]) -> HashMap<String, usize> {
    let convs = sites
        .iter()
        .filter(|site| site.layer == Some(LayerKind::Conv));
    let convs: Vec<&Site> = convs.collect();
    if convs.is_empty() {
        return HashMap::new();
    }
    let shown = groups_in(&format!("{module:?}"));
    let agree = shown.len() == convs.len()
        && shown
            .iter()
            .zip(&convs)
            .all(|((holder, _), conv)| *holder == conv.holder);
    match agree {
        false => HashMap::new(),
        true => {
            let groups = shown.into_iter().map(|(_, groups)| groups);
            let paths = convs.iter().map(|conv| conv.path.clone());
            paths.zip(groups).collect()
        }
    }
}

/// The convolutions in a text of `Debug`, with their groups.
fn groups_in(text: &str) -> Vec<(&'static str, usize)> {
    let mut found: Vec<(usize, &'static str, usize)> = Vec::new();
    for (holder, begin) in [("Conv1d", "Conv1d {"), ("Conv2d", "Conv2d {")] {
        for (at, _) in text.match_indices(begin) {
            // `DeformConv2d` is another layer.
            let is_whole = !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            let Some((_, rest)) = text[at..].split_once("groups: ").filter(|_| is_whole) else {
                continue;
            };
            let digits = rest.find(|c: char| !c.is_ascii_digit());
            if let Ok(groups) = rest[..digits.unwrap_or(rest.len())].parse() {
                found.push((at, holder, groups));
            }
        }
    }
    found.sort_unstable();
    let convs = found.into_iter();
    convs.map(|(_, holder, groups)| (holder, groups)).collect()
}

#[cfg(test)]
mod tests {
    use burn::module::{Module, Param};
    use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::model::traverse::collect;

    #[derive(Module, Debug)]
    struct Net {
        one: Vec<Conv2d>,
        linear: Linear,
        two: Option<Conv1d>,
        free: Param<Tensor<3>>,
    }

    #[test]
    fn the_groups_of_derived_layers_are_found_by_their_order() {
        let device = Device::default();
        let conv = |groups| {
            Conv2dConfig::new([4, 4], [3, 3])
                .with_groups(groups)
                .init(&device)
        };
        let net = Net {
            one: vec![conv(1), conv(2), conv(4)],
            linear: LinearConfig::new(2, 2).init(&device),
            two: Some(Conv1dConfig::new(6, 6, 1).with_groups(3).init(&device)),
            free: Param::from_tensor(Tensor::zeros([1, 1, 1], &device)),
        };
        let groups = shown_groups(&net, &collect(&net));
        let mut groups: Vec<_> = groups.into_iter().collect();
        groups.sort();
        let expected = [
            ("one.0.weight", 1),
            ("one.1.weight", 2),
            ("one.2.weight", 4),
            ("two.weight", 3),
        ];
        assert_eq!(groups, expected.map(|(path, n)| (path.to_owned(), n)));
    }

    #[test]
    fn texts_that_are_not_those_of_the_layers_tell_nothing() {
        assert!(groups_in("DeformConv2d { groups: 2 }").is_empty());
        assert!(groups_in("Conv2d { }").is_empty());
        let device = Device::default();
        let conv = Conv1dConfig::new(2, 2, 1).init(&device);
        assert!(shown_groups(&"hidden", &collect(&conv)).is_empty());
    }
}
