//! What a saved file says of where an adapter is: its own lists where they are true, and otherwise names that mean exactly its modules.

use burn::tensor::Device;
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{AdapterConfig, AdapterFile, SaveOptions};
use burn_peft::model::{
    ModuleNames, PatternMap, PeftConfig, PeftModel, TargetConfig, TargetModules, TrainableTokens,
};

use super::generated::{Shape, Tree};

fn tree(paths: &[&str]) -> PeftModel<Tree> {
    of_kinds(
        &paths
            .iter()
            .map(|path| (*path, Shape::Linear(true)))
            .collect::<Vec<_>>(),
    )
}

fn of_kinds(layers: &[(&str, Shape)]) -> PeftModel<Tree> {
    let mut root = Vec::new();
    for (path, shape) in layers {
        put(&mut root, path, shape.clone());
    }
    PeftModel::new(Tree::new(&Shape::Tree(root), &Device::default()))
}

/// Puts a layer at a dotted path.
fn put(children: &mut Vec<(String, Shape)>, path: &str, shape: Shape) {
    let Some((name, rest)) = path.split_once('.') else {
        children.push((path.into(), shape));
        return;
    };
    let place = children.iter().position(|(own, _)| own == name);
    let place = place.unwrap_or_else(|| {
        children.push((name.into(), Shape::Tree(Vec::new())));
        children.len() - 1
    });
    let Shape::Tree(inside) = &mut children[place].1 else {
        panic!("`{name}` is a layer")
    };
    put(inside, rest, shape);
}

/// The configuration that is saved of these modules, each with a rank and an alpha.
fn saved(
    model: &mut PeftModel<Tree>,
    modules: &[(&str, usize, f64)],
    targets: TargetConfig,
) -> Result<AdapterConfig, PeftError> {
    let factors = modules.iter().map(|(path, rank, alpha)| {
        let lora = LoraConfig::new(*rank).with_alpha(*alpha);
        let lora = lora.init(4, 4, &Device::default()).unwrap();
        ((*path).to_owned(), lora)
    });
    let config = PeftConfig::new(LoraConfig::new(4).with_alpha(8.0), targets);
    model.insert_adapter("default", &config, factors.collect())?;
    let file = AdapterFile::from_model(model, "default", &SaveOptions::default())?;
    Ok(file.config)
}

fn list(names: &[&str]) -> TargetModules {
    TargetModules::List(names.iter().map(|name| (*name).to_owned()).collect())
}

fn keys<V: Clone>(patterns: &PatternMap<V>) -> Vec<(String, V)> {
    let patterns = patterns.iter();
    patterns
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect()
}

const PATHS: [&str; 5] = ["a.q", "a.v", "b.q", "b.v", "head"];

#[test]
fn a_list_that_is_true_is_kept_and_all_else_is_listed() {
    let all = [("a.q", 4, 8.0), ("b.q", 2, 8.0)];
    let own = TargetConfig::list(["q"]).with_rank_pattern("b.q", 2);
    let config = saved(&mut tree(&PATHS), &all, own.clone()).unwrap();
    assert_eq!(config.targets, own);
    for targets in [
        TargetConfig::all_linear().with_rank_pattern("b.q", 2),
        TargetConfig::regex("a.q|b.*").with_rank_pattern("b.q", 2),
    ] {
        let config = saved(&mut tree(&PATHS), &all, targets).unwrap();
        assert_eq!(config.targets.target_modules, list(&["a.q", "b.q"]));
        assert_eq!(keys(&config.targets.rank_pattern), [("b.q".to_owned(), 2)]);
        assert!(config.targets.exclude_modules.is_none());
    }
}

#[test]
fn a_list_that_is_not_true_is_replaced_and_other_ranks_have_a_plain_key_each() {
    let all = [("a.q", 4, 1.5), ("a.v", 2, 8.0), ("b.q", 2, 8.0)];
    for targets in [TargetConfig::list(["q", "v"]), TargetConfig::list(["a.q"])] {
        let config = saved(&mut tree(&PATHS), &all, targets).unwrap();
        assert_eq!(config.targets.target_modules, list(&["a.q", "a.v", "b.q"]));
        assert_eq!(
            keys(&config.targets.rank_pattern),
            [("a.v".to_owned(), 2), ("b.q".to_owned(), 2)]
        );
        assert_eq!(
            keys(&config.targets.alpha_pattern),
            [("a.q".to_owned(), 1.5)]
        );
    }
}

/// Once errors that came only at saving.
#[test]
fn paths_that_end_alike_are_told_apart_by_exclusion() {
    let paths = ["head", "draft.head", "x.draft.head", "other"];
    let none = TargetConfig::list::<String>([]);
    let config = saved(&mut tree(&paths), &[("head", 4, 8.0)], none.clone()).unwrap();
    assert_eq!(config.targets.target_modules, list(&["head"]));
    let matcher = config.targets.compile(None).unwrap();
    for path in paths {
        assert_eq!(matcher.matches(path).unwrap(), path == "head", "{path}");
    }
    // `draft.head` excludes `x.draft.head` too, so that a list of names cannot leave the latter in.
    let both = [("head", 4, 8.0), ("x.draft.head", 4, 8.0)];
    let config = saved(&mut tree(&paths), &both, none).unwrap();
    let matcher = config.targets.compile(None).unwrap();
    for path in paths {
        let expected = both.iter().any(|(own, ..)| *own == path);
        assert_eq!(matcher.matches(path).unwrap(), expected, "{path}");
    }
    assert!(matches!(
        config.targets.exclude_modules,
        Some(ModuleNames::Regex(_))
    ));
}

#[test]
fn long_lists_are_condensed_as_peft_condenses_them() {
    let paths: Vec<String> = (0..24)
        .flat_map(|layer| ["q", "k", "v"].map(|name| format!("layers.{layer}.attn.{name}")))
        .collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let adapted: Vec<_> = paths
        .iter()
        .filter(|path| !path.ends_with('k'))
        .map(|path| (*path, 4, 8.0))
        .collect();
    let config = saved(&mut tree(&paths), &adapted, TargetConfig::all_linear()).unwrap();
    assert_eq!(config.targets.target_modules, list(&["q", "v"]));
}

#[test]
fn names_of_saved_modules_mean_what_they_mean_in_peft() {
    // `classifier` means `pre_classifier` too.
    let mut model = tree(&["pre_classifier", "classifier", "q"]);
    let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["q"]))
        .with_modules_to_save(["classifier"]);
    model.add_adapter("default", &config).unwrap();
    let file = AdapterFile::from_model(&model, "default", &SaveOptions::default()).unwrap();
    let paths: Vec<_> = file.copies.iter().map(|copy| copy.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "pre_classifier.weight",
            "pre_classifier.bias",
            "classifier.weight",
            "classifier.bias"
        ]
    );
    assert_eq!(file.config.modules_to_save, ["classifier"]);
}

#[test]
fn what_no_file_can_say_is_refused_when_it_is_added_with_the_way_out() {
    let refused = |mut model: PeftModel<Tree>, config: PeftConfig, parts: &[&str]| {
        let before = model.report();
        let error = model.add_adapter("default", &config).unwrap_err();
        assert!(matches!(error, PeftError::Config { .. }), "{error}");
        let text = error.to_string();
        for part in parts {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(model.report(), before);
        assert_eq!(model.adapters().count(), 0);
    };
    let tokens = TrainableTokens::Named([("embed".to_owned(), vec![1])].into());
    let layers = [("embed", Shape::Embedding), ("q", Shape::Linear(false))];
    refused(
        of_kinds(&layers),
        PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["embed", "q"]))
            .with_trainable_tokens(tokens.clone()),
        &["trainable_token_indices", "`embed`", "exclude_modules"],
    );
    refused(
        of_kinds(&layers),
        PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["q"]))
            .with_modules_to_save(["embed"])
            .with_trainable_tokens(tokens),
        &["trainable_token_indices", "`embed`", "modules_to_save"],
    );
}
