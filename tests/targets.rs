//! Target selection agrees with Python PEFT on every path under every configuration of
//! `tests/golden/targets/targets.json` (made by `generate.py` beside it from PEFT's own functions).

use burn_peft::model::TargetConfig;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    r: usize,
    lora_alpha: f64,
    paths: Vec<String>,
    rows: Vec<Row>,
    all_linear: Vec<AllLinear>,
}

/// What PEFT says of every path under one configuration.
#[derive(Deserialize)]
struct Row {
    config: TargetConfig,
    /// One digit per path: 1 where it gets an adapter.
    matched: String,
    rank: Vec<usize>,
    alpha: Vec<f64>,
}

/// What PEFT takes of one model's linear modules for `"all-linear"`.
#[derive(Deserialize)]
struct AllLinear {
    candidates: Vec<String>,
    head: Option<String>,
    config: TargetConfig,
    taken: Vec<String>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/targets/targets.json")).unwrap()
}

#[test]
fn lists_expressions_layers_and_patterns_agree_with_peft() {
    let golden = golden();
    let mut wrong = Vec::new();
    let (mut matched, mut unmatched, mut patterned) = (0, 0, 0);
    for row in &golden.rows {
        assert_eq!(row.matched.len(), golden.paths.len());
        let matcher = row
            .config
            .compile(None)
            .unwrap_or_else(|e| panic!("{:?}: {e}", row.config));
        for (i, path) in golden.paths.iter().enumerate() {
            let expected = (&row.matched[i..=i] == "1", row.rank[i], row.alpha[i]);
            let found = (
                matcher.matches(path).unwrap(),
                matcher.rank_for(path, golden.r).unwrap(),
                matcher.alpha_for(path, golden.lora_alpha).unwrap(),
            );
            if found != expected {
                wrong.push(format!(
                    "{:?} on {path}: expected {expected:?}, found {found:?}",
                    row.config
                ));
            }
            *(if expected.0 {
                &mut matched
            } else {
                &mut unmatched
            }) += 1;
            patterned += usize::from((expected.1, expected.2) != (golden.r, golden.lora_alpha));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    // The data itself asks something: both answers and many patterns occur.
    assert!(
        matched > 300 && unmatched > 300 && patterned > 100,
        "{matched} {unmatched} {patterned}"
    );
}

#[test]
fn all_linear_agrees_with_peft_on_whole_models() {
    for model in golden().all_linear {
        let matcher = model.config.compile(model.head.as_deref()).unwrap();
        let report = matcher.resolve(&model.candidates).unwrap();
        let taken: Vec<_> = report.matched.into_iter().map(|m| m.path).collect();
        assert_eq!(taken, model.taken);
        assert!(!taken.is_empty());
    }
}

#[test]
fn resolving_chooses_what_matching_chooses() {
    let golden = golden();
    for row in &golden.rows {
        let config = row.config.clone().with_allow_unmatched(true);
        let matcher = config.compile(None).unwrap();
        let report = matcher.resolve(&golden.paths).unwrap();
        let expected: Vec<_> = golden
            .paths
            .iter()
            .filter(|path| matcher.matches(path).unwrap())
            .collect();
        assert_eq!(
            report.matched.iter().map(|m| &m.path).collect::<Vec<_>>(),
            expected
        );
        let total = report.matched.len() + report.unmatched.len() + report.excluded.len();
        assert_eq!(total, golden.paths.len());
        for chosen in &report.matched {
            let by_key = |map: &burn_peft::model::PatternMap<usize>, key: &Option<String>| {
                let key = key.as_deref()?;
                map.iter()
                    .find(|(known, _)| *known == key)
                    .map(|(_, &rank)| rank)
            };
            assert_eq!(
                by_key(&row.config.rank_pattern, &chosen.rank_key).unwrap_or(golden.r),
                matcher.rank_for(&chosen.path, golden.r).unwrap()
            );
        }
    }
}
