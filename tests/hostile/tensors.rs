//! H4 to H7 and H9: tensors of shapes and types that no factor has, without their partner, of two writers, of another
//! rank than the configuration says, for other modules than the model has.

use burn_peft::PeftError;
use burn_peft::format::{LoadOptions, LoadReport, Mismatch, ReadOptions, WEIGHTS_FILE};
use serde_json::json;

use super::victim::Victim;
use super::{MODULES, Scratch, key};

fn report(scratch: &Scratch) -> LoadReport {
    match scratch.refused_in(WEIGHTS_FILE) {
        PeftError::Incomplete { report } => *report,
        other => panic!("{other}"),
    }
}

fn f32s(name: String, shape: &[usize]) -> (String, &'static str, usize, &[usize]) {
    (name, "F32", 4, shape)
}

fn mismatch(tensor: String, expected: &[usize], found: &[usize]) -> Mismatch {
    Mismatch {
        tensor,
        expected: expected.into(),
        found: found.into(),
    }
}

// H4
#[test]
fn a_shape_that_overflows_is_refused_and_named() {
    let name = key(MODULES[0], "A");
    for shape in [
        json!([1_u64 << 62, 1_u64 << 62]),
        json!([1_u64 << 32, 1_u64 << 32]),
        json!([u64::MAX]),
        // Its product fits, its bits do not.
        json!([1_u64 << 60]),
        json!([u64::MAX, 2, 0]),
    ] {
        let header = json!({&name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}});
        let reason = Scratch::new()
            .tensors(header.to_string(), &[])
            .malformed(WEIGHTS_FILE);
        assert!(
            reason.contains(&format!("tensor `{name}`: shape {}", shown(&shape))),
            "{reason}"
        );
    }
}

fn shown(shape: &serde_json::Value) -> String {
    let sides: Vec<u64> = serde_json::from_value(shape.clone()).unwrap();
    format!("{sides:?}")
}

// H4
#[test]
fn an_empty_tensor_with_an_endless_side_is_a_mismatch() {
    for shape in [
        &[0, usize::MAX][..],
        &[usize::MAX, 0],
        &[0, usize::MAX, usize::MAX],
        &[0, 6, usize::MAX, usize::MAX],
        &[0],
        &[2, 0],
        &[0, 6],
    ] {
        let name = key(MODULES[0], "A");
        let header = json!({
            &name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]},
            key(MODULES[0], "B"): {"dtype": "F32", "shape": [6, 2], "data_offsets": [0, 48]},
        });
        let scratch = Scratch::new();
        scratch.tensors(header.to_string(), &[0; 48]);
        let report = report(&scratch);
        assert_eq!(
            report.left_out.len() + report.mismatched.len(),
            2,
            "{report}"
        );
        assert!(!report.mismatched.is_empty(), "{shape:?}");
    }
}

// H4
#[test]
fn a_tensor_of_another_number_of_dimensions_is_a_mismatch() {
    for shape in [&[][..], &[2], &[12], &[2, 6, 1], &[1, 2, 6], &[1; 16]] {
        let scratch = Scratch::new();
        scratch.zeros(&[
            f32s(key(MODULES[0], "A"), shape),
            f32s(key(MODULES[0], "B"), &[6, 2]),
        ]);
        let report = report(&scratch);
        // Which of the two is called wrong depends on what a tensor of so many dimensions may be.
        let named: Vec<_> = report
            .mismatched
            .iter()
            .map(|mismatch| &mismatch.tensor)
            .collect();
        let there = [key(MODULES[0], "A"), key(MODULES[0], "B")];
        assert!(!named.is_empty(), "{report}");
        assert!(named.iter().all(|name| there.contains(name)), "{report}");
    }
}

// H5
#[test]
fn a_type_that_no_factor_has_is_refused_and_named() {
    for (dtype, size) in [
        ("F64", 8),
        ("I64", 8),
        ("U64", 8),
        ("C64", 8),
        ("I32", 4),
        ("U32", 4),
        ("I16", 2),
        ("I8", 1),
        ("U8", 1),
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("BOOL", 1),
    ] {
        let scratch = Scratch::new();
        scratch.zeros(&[
            (key(MODULES[0], "A"), dtype, size, &[2, 6]),
            f32s(key(MODULES[0], "B"), &[6, 2]),
        ]);
        match scratch.refused_in(WEIGHTS_FILE) {
            PeftError::DType { tensor, found, .. } => {
                assert_eq!((tensor, found.as_str()), (key(MODULES[0], "A"), dtype));
            }
            other => panic!("{dtype}: {other}"),
        }
    }
}

// H5
#[test]
fn factors_of_two_types_are_refused_and_named() {
    let scratch = Scratch::new();
    scratch.zeros(&[
        (key(MODULES[0], "A"), "BF16", 2, &[2, 6]),
        f32s(key(MODULES[0], "B"), &[6, 2]),
    ]);
    match scratch.refused_in(WEIGHTS_FILE) {
        PeftError::DType { tensor, .. } => assert_eq!(tensor, key(MODULES[0], "B")),
        other => panic!("{other}"),
    }
}

// H6
#[test]
fn a_factor_without_its_partner_is_refused_and_its_partner_named() {
    for (there, missing, shape) in [("A", "B", [2, 6]), ("B", "A", [6, 2])] {
        let scratch = Scratch::new();
        scratch.zeros(&[
            f32s(key(MODULES[0], there), &shape),
            f32s(key(MODULES[1], "A"), &[2, 6]),
            f32s(key(MODULES[1], "B"), &[6, 2]),
        ]);
        assert_eq!(report(&scratch).missing, [key(MODULES[0], missing)]);
    }
}

// H6
#[test]
fn two_tensors_for_one_factor_are_refused_and_named() {
    let (a, b) = (key(MODULES[0], "A"), key(MODULES[0], "B"));
    for other in [
        format!("base_model.model.{}.lora_A.default.weight", MODULES[0]),
        format!("{}.lora_A.weight", MODULES[0]),
        format!("{}.lora_a.weight", MODULES[0]),
        format!("base_model.model._orig_mod.{}.lora_A.weight", MODULES[0]),
        // mlx-lm's, transposed.
        format!("{}.lora_a", MODULES[0]),
    ] {
        let scratch = Scratch::new();
        scratch.zeros(&[
            f32s(a.clone(), &[2, 6]),
            f32s(b.clone(), &[6, 2]),
            f32s(other.clone(), &[2, 6]),
        ]);
        let report = report(&scratch);
        // Of the two, sorted by name, the first has the place.
        let last = a.clone().max(other);
        assert_eq!(report.unexpected, [last]);
    }
}

// H7
#[test]
fn a_rank_that_is_not_the_configuration_s_is_a_mismatch() {
    // Both factors agree with each other, and neither with `r = 2`.
    let (a, b) = (key(MODULES[0], "A"), key(MODULES[0], "B"));
    let scratch = Scratch::new();
    scratch.zeros(&[f32s(a.clone(), &[3, 6]), f32s(b.clone(), &[6, 3])]);
    let both = [
        mismatch(a.clone(), &[2, 6], &[3, 6]),
        mismatch(b.clone(), &[6, 2], &[6, 3]),
    ];
    assert_eq!(report(&scratch).mismatched, both);

    // One factor does not agree with the other.
    let scratch = Scratch::new();
    scratch.zeros(&[f32s(a.clone(), &[3, 6]), f32s(b.clone(), &[6, 2])]);
    assert_eq!(report(&scratch).mismatched, both[..1]);

    // A pattern says another rank of one module.
    let scratch = Scratch::new();
    scratch.set("rank_pattern", json!({"blocks.1.query": 4}));
    let (a, b) = (key(MODULES[1], "A"), key(MODULES[1], "B"));
    let expected = [mismatch(a, &[4, 6], &[2, 6]), mismatch(b, &[6, 4], &[6, 2])];
    assert_eq!(report(&scratch).mismatched, expected);

    // The largest rank: nothing of its size is allocated.
    let scratch = Scratch::new();
    scratch.set("r", json!(65536));
    assert_eq!(report(&scratch).mismatched.len(), 4);
}

// H7
#[test]
fn sides_that_are_not_the_layer_s_are_mismatches() {
    let (a, b) = (key(MODULES[0], "A"), key(MODULES[0], "B"));
    let others = [
        f32s(key(MODULES[1], "A"), &[2, 6]),
        f32s(key(MODULES[1], "B"), &[6, 2]),
    ];
    for (shape_a, shape_b, expected) in [
        ([2, 7], [6, 2], mismatch(a.clone(), &[2, 6], &[2, 7])),
        ([2, 6], [5, 2], mismatch(b.clone(), &[6, 2], &[5, 2])),
        // Transposed.
        ([6, 2], [6, 2], mismatch(a.clone(), &[2, 2], &[6, 2])),
        ([2, 6], [2, 6], mismatch(b.clone(), &[2, 2], &[2, 6])),
    ] {
        let scratch = Scratch::new();
        let tensors = [f32s(a.clone(), &shape_a), f32s(b.clone(), &shape_b)];
        scratch.zeros(&[&tensors[..], &others].concat());
        assert_eq!(report(&scratch).mismatched, [expected]);
    }
}

// H9
#[test]
fn tensors_without_a_place_are_refused_and_all_named() {
    let factors = [
        f32s(key(MODULES[0], "A"), &[2, 6]),
        f32s(key(MODULES[0], "B"), &[6, 2]),
    ];
    let rest = [
        f32s(key(MODULES[1], "A"), &[2, 6]),
        f32s(key(MODULES[1], "B"), &[6, 2]),
    ];
    let strays = [
        "base_model.model.blocks.0.query.lora_A.bias",
        "base_model.model.blocks.0.query.lora_magnitude_vector",
        "base_model.model.blocks.0.query.weight",
        "base_model.model.lora_A.weight",
        "optimizer.state",
    ];
    let tensors = strays.map(|name| f32s(name.to_owned(), &[2, 2]));
    let scratch = Scratch::new();
    scratch.zeros(&[&factors[..], &rest, &tensors].concat());
    assert_eq!(report(&scratch).unexpected, strays);

    // What is printed holds no control characters, which a terminal would obey; `Victim` looks at that.
    let scratch = Scratch::new();
    scratch.zeros(&[&factors[..], &rest, &[f32s("\u{1b}[31m\"\n".into(), &[1])]].concat());
    assert_eq!(report(&scratch).unexpected, ["\u{1b}[31m\"\n"]);
}

// H9
#[test]
fn an_adapter_of_another_model_is_refused_and_leaves_no_part_of_itself() {
    // One module is there, one is not, and one that the configuration chooses has nothing.
    let elsewhere = "layers.7.query";
    let scratch = Scratch::new();
    scratch.zeros(&[
        f32s(key(MODULES[0], "A"), &[2, 6]),
        f32s(key(MODULES[0], "B"), &[6, 2]),
        f32s(key(elsewhere, "A"), &[2, 6]),
        f32s(key(elsewhere, "B"), &[6, 2]),
    ]);
    let found = report(&scratch);
    assert_eq!(found.unexpected, [key(elsewhere, "A"), key(elsewhere, "B")]);
    assert_eq!(found.missing, [key(MODULES[1], "A"), key(MODULES[1], "B")]);

    // Nothing fits: refused even by who is not strict.
    let scratch = Scratch::new();
    scratch.zeros(&[
        f32s(key(elsewhere, "A"), &[2, 6]),
        f32s(key(elsewhere, "B"), &[6, 2]),
    ]);
    let options = LoadOptions {
        strict: false,
        ..Default::default()
    };
    let error = Victim::new().fails(1 << 10, |model| {
        model.load_adapter("other", scratch.path(), &options)
    });
    assert!(error.to_string().contains("0 tensors loaded"), "{error}");
}

// H9
#[test]
fn a_file_of_no_tensors_is_no_adapter() {
    let scratch = Scratch::new();
    scratch.zeros(&[]);
    assert_eq!(report(&scratch), LoadReport::default());
}

// H9
#[test]
fn patterns_that_choose_other_modules_miss_theirs_and_leave_the_tensors_without_a_place() {
    // Chooses `value`, of which there are no tensors: what it demands is missing.
    let scratch = Scratch::new();
    scratch.set("target_modules", json!(["value"]));
    assert_eq!(report(&scratch).missing.len(), 4);

    // Chooses nothing, so that PEFT would load nothing, without a word; and says the rank of nothing.
    let scratch = Scratch::new();
    scratch
        .set("target_modules", json!(["nothing"]))
        .set("rank_pattern", json!({"nothing": 7}));
    let found = report(&scratch);
    assert_eq!((found.loaded.len(), found.unexpected.len()), (0, 4));
    assert!(
        found
            .notes
            .iter()
            .all(|note| note.contains("ReadOptions::ignored_keys")),
        "{found}"
    );
    // The file is what its tensors say, if that is asked for.
    let mut victim = Victim::new();
    let read = ReadOptions::new().with_ignored_keys(["target_modules"]);
    let options = LoadOptions::new().with_read(read);
    let found = victim
        .model
        .load_adapter("other", scratch.path(), &options)
        .unwrap();
    assert_eq!(found.loaded.len(), 4);
    let factors = victim.model.factors("other").unwrap();
    let found: Vec<_> = factors
        .iter()
        .map(|(path, lora)| (path.as_str(), lora.rank()))
        .collect();
    assert_eq!(found, MODULES.map(|path| (path, 2)));
}
