use crate::base::files::content;
use burn_peft::format::*;
#[test]
fn real_cases() {
    let cases = std::path::Path::new("/work/shared/cases");
    let ok = content(&BaseCheckpoint::open(cases.join("index_ok")).unwrap());
    for (case, kinds) in [
        ("index_absent", vec![IndexFaultKind::MissingTensor]),
        (
            "index_absent_tied_head",
            vec![IndexFaultKind::MissingTensor],
        ),
        ("index_total", vec![IndexFaultKind::TotalSize]),
        ("index_unlisted", vec![IndexFaultKind::Unlisted]),
    ] {
        let e = BaseCheckpoint::open(cases.join(case)).unwrap_err();
        println!("{case}: {e}");
        let o = BaseOptions::new().with_allowed_index_faults(kinds);
        let c = BaseCheckpoint::open_with(cases.join(case), &o).unwrap();
        let c = content(&c);
        println!(
            "{:?}",
            c.keys()
                .filter(|k| !ok.contains_key(*k))
                .collect::<Vec<_>>()
        );
        assert!(ok.iter().all(|(k, v)| c[k] == *v));
    }
    for case in [
        "bert_gamma_mini",
        "bert_weight_mini",
        "gpt2_base",
        "roberta_cls_base",
        "llama_tied_resized",
        "gpt2_resized",
        "roberta_resized",
    ] {
        let f = std::fs::read_dir(cases.join(case))
            .unwrap()
            .map(|e| e.unwrap().path())
            .find(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .unwrap();
        let c = BaseCheckpoint::open(&f).unwrap();
        println!("{case}");
        for t in c.tensors() {
            println!("   {} {:?} {:?}", t.name, t.dtype, t.shape);
        }
    }
}
