//! H1 to H3: headers of the file of tensors that lie, are no headers, or place tensors where none can be.

use std::fs::{self, OpenOptions};
use std::io::Write;

use burn_peft::format::{MAX_HEADER_BYTES, MAX_TENSORS, WEIGHTS_FILE};
use serde_json::{Value, json};

use super::{MODULES, Scratch, key};

fn malformed(header: impl AsRef<[u8]>, values: &[u8]) -> String {
    Scratch::new()
        .tensors(header, values)
        .malformed(WEIGHTS_FILE)
}

// H1
#[test]
fn a_file_too_short_for_a_length_is_refused() {
    for bytes in 0..8 {
        let reason = Scratch::new()
            .weights(&vec![0; bytes])
            .malformed(WEIGHTS_FILE);
        assert_eq!(
            reason,
            format!("{bytes} bytes are too few for a safetensors file")
        );
    }
}

// H1
#[test]
fn a_length_that_lies_is_refused_before_anything_is_allocated() {
    for length in [
        3,
        1 << 20,
        MAX_HEADER_BYTES + 1,
        1 << 40,
        1 << 63,
        u64::MAX - 7,
        u64::MAX,
    ] {
        let scratch = Scratch::new();
        scratch.weights(&[&length.to_le_bytes()[..], b"{}"].concat());
        let reason = scratch.malformed(WEIGHTS_FILE);
        assert!(
            reason.starts_with(&format!("a header of {length} bytes")),
            "{reason}"
        );
    }
    // In a file that is large enough, on a disk that stores no zeros.
    let scratch = Scratch::new();
    scratch.weights(&(MAX_HEADER_BYTES + 1).to_le_bytes());
    let file = OpenOptions::new()
        .write(true)
        .open(scratch.file(WEIGHTS_FILE))
        .unwrap();
    file.set_len(1 << 30).unwrap();
    assert!(
        scratch
            .malformed(WEIGHTS_FILE)
            .starts_with("a header of 100000001 bytes")
    );
}

// H1
#[test]
fn a_huge_header_takes_no_more_than_its_size_a_few_times() {
    // Blanks are JSON, and nothing else is in it.
    let blank = format!("{}{{}}", " ".repeat(MAX_HEADER_BYTES as usize - 2));
    let error = Scratch::new().tensors(blank, &[]).refused_in(WEIGHTS_FILE);
    assert!(error.to_string().contains("0 tensors loaded"), "{error}");

    // Tensors of no values, all that such a header can have.
    let entry = |i: usize| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    let entries: Vec<_> = (0..MAX_HEADER_BYTES as usize / 64).map(entry).collect();
    let text = format!("{{{}}}", entries.join(","));
    drop(entries);
    let reason = malformed(text, &[]);
    assert!(
        reason.contains(&format!("more than {MAX_TENSORS} tensors")),
        "{reason}"
    );

    // As many as are read, none of which is a factor.
    let entries: Vec<_> = (0..MAX_TENSORS).map(entry).collect();
    let error = Scratch::new()
        .tensors(format!("{{{}}}", entries.join(",")), &[])
        .refused_in(WEIGHTS_FILE);
    assert!(
        error
            .to_string()
            .contains("500000 unexpected: `{0..499999}`"),
        "{error}"
    );

    // A tensor of a million dimensions, a name and metadata of a megabyte, a million entries of metadata.
    let dimensions = vec!["0"; 1 << 20].join(",");
    let reason = malformed(
        format!(r#"{{"q":{{"dtype":"F32","shape":[{dimensions}],"data_offsets":[0,0]}}}}"#),
        &[],
    );
    assert!(
        reason.contains("tensor `q`") && reason.contains("at most 16"),
        "{reason}"
    );
    let name = "x".repeat(1 << 20);
    let reason = malformed(
        format!(r#"{{"{name}":{}}}"#, entry(0).split_once(':').unwrap().1),
        &[],
    );
    assert!(reason.contains("a name of 1048576 bytes"), "{reason}");
    let error = Scratch::new()
        .tensors(format!(r#"{{"__metadata__":{{"a":"{name}"}}}}"#), &[])
        .refused_in(WEIGHTS_FILE);
    assert!(error.to_string().contains("0 tensors loaded"), "{error}");
    let entries: Vec<_> = (0..1 << 20).map(|i| format!(r#""{i}":"""#)).collect();
    let reason = malformed(
        format!(r#"{{"__metadata__":{{{}}}}}"#, entries.join(",")),
        &[],
    );
    assert!(reason.contains("`__metadata__` of at most"), "{reason}");
}

// H2
#[test]
fn a_header_that_is_none_is_refused() {
    let nested =
        |open: &str, close: &str| format!("{}{}", open.repeat(1 << 20), close.repeat(1 << 20));
    let entry = |entry: &str| format!(r#"{{"q":{entry}}}"#);
    for header in [
        Vec::new(),
        b"\xff".to_vec(),
        b"{\"\xff\": 1}".to_vec(),
        b"not JSON".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"{".to_vec(),
        b"{} {}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        "{\"a\u{0}b\": 1}".into(),
        nested("[", "]").into(),
        nested("{\"q\":", "}").into(),
        entry(&nested("[", "]")).into(),
        entry("3").into(),
        entry("null").into(),
        entry("{}").into(),
        entry(r#"{"dtype":"F32","shape":[0]}"#).into(),
        entry(r#"{"dtype":"F33","shape":[0],"data_offsets":[0,0]}"#).into(),
        entry(r#"{"dtype":"f32","shape":[0],"data_offsets":[0,0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":[0.5],"data_offsets":[0,0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":[1e400],"data_offsets":[0,0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":0,"data_offsets":[0,0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":[0],"data_offsets":[0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0,0]}"#).into(),
        entry(r#"{"dtype":"F32","shape":[0],"data_offsets":[0,-1]}"#).into(),
    ] {
        let reason = malformed(&header, &[]);
        assert!(
            reason.starts_with("the header is not safetensors': "),
            "{reason}"
        );
        if header.starts_with(b"{\"q\":") && !header.starts_with(b"{\"q\":[[") {
            assert!(
                reason.contains("`q`") || reason.contains("recursion"),
                "{reason}"
            );
        }
    }
}

// H2
#[test]
fn a_name_that_stands_twice_is_refused_and_named() {
    let scratch = Scratch::new();
    let bytes = scratch.bytes(WEIGHTS_FILE);
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, values) = (
        std::str::from_utf8(&bytes[8..8 + n]).unwrap(),
        &bytes[8 + n..],
    );
    let name = key(MODULES[0], "A");
    let entry: Value = serde_json::from_str(header).unwrap();
    let entry = &entry[&name];
    // With equal offsets the safetensors crate takes the last of the two without a word.
    let twice = header.trim_end().strip_suffix('}').unwrap();
    let twice = format!("{twice},\"{name}\":{entry}}}");
    let whole = [
        &(twice.len() as u64).to_le_bytes()[..],
        twice.as_bytes(),
        values,
    ]
    .concat();
    assert_eq!(
        safetensors::SafeTensors::deserialize(&whole).unwrap().len(),
        4
    );
    let reason = scratch.weights(&whole).malformed(WEIGHTS_FILE);
    assert!(
        reason.contains(&format!("the key `{name}` stands twice")),
        "{reason}"
    );

    for (twice, named) in [
        (
            r#"{"__metadata__":{"format":"pt","format":"np"}}"#,
            "`format`",
        ),
        (r#"{"__metadata__":{},"__metadata__":{}}"#, "`__metadata__`"),
        (
            r#"{"q":{"dtype":"F32","shape":[0],"shape":[0],"data_offsets":[0,0]}}"#,
            "`shape`",
        ),
    ] {
        let reason = malformed(twice, &[]);
        assert!(reason.contains(named), "{reason}");
    }
}

// H2
#[test]
fn metadata_that_is_not_text_is_refused() {
    for metadata in [
        json!({"format": 3}),
        json!({"format": null}),
        json!({"format": ["pt"]}),
        json!({"format": {"pt": "pt"}}),
        json!(["pt"]),
        json!("pt"),
    ] {
        let reason = malformed(json!({"__metadata__": metadata}).to_string(), &[]);
        assert!(reason.contains("metadata"), "{metadata}: {reason}");
    }
    // None at all is none, as the `safetensors` crate has it.
    let none = json!({"__metadata__": null}).to_string();
    let error = Scratch::new().tensors(none, &[]).refused_in(WEIGHTS_FILE);
    assert!(error.to_string().contains("0 tensors loaded"), "{error}");
}

// H3
#[test]
fn tensors_that_overlap_or_leave_gaps_or_lie_outside_are_refused_and_named() {
    let (a, b) = (key("q", "A"), key("q", "B"));
    let tensor = |begin: u64, end: u64| json!({"dtype": "F32", "shape": [1, 1], "data_offsets": [begin, end]});
    for (header, values, named) in [
        // Overlapping: the same bytes, some of them, all of them within others.
        (json!({&a: tensor(0, 4), &b: tensor(0, 4)}), 4, &b),
        (json!({&a: tensor(0, 4), &b: tensor(2, 6)}), 6, &b),
        (
            json!({&a: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, &b: tensor(4, 8)}),
            16,
            &b,
        ),
        // A gap in the middle, and at the beginning.
        (json!({&a: tensor(0, 4), &b: tensor(8, 12)}), 12, &b),
        (json!({&a: tensor(8, 12)}), 12, &a),
        // Reversed.
        (json!({&a: tensor(4, 0)}), 4, &a),
        (json!({&a: tensor(0, 4), &b: tensor(4, 0)}), 8, &b),
        // Of another size than shape and type say.
        (json!({&a: tensor(0, 8)}), 8, &a),
        (json!({&a: tensor(0, 0)}), 0, &a),
        (
            json!({&a: {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}}),
            0,
            &a,
        ),
    ] {
        let reason = malformed(header.to_string(), &vec![0; values]);
        assert!(
            reason.contains(&format!("tensor `{named}`")),
            "{header}: {reason}"
        );
    }
    // Past the end, as far as numbers go.
    for end in [8, 1 << 40, u64::MAX] {
        let header = json!({&a: {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}});
        let reason = malformed(header.to_string(), &[0; 4]);
        assert!(reason.contains("4"), "{reason}");
    }
}

// H3
#[test]
fn bytes_behind_the_last_value_are_refused() {
    let scratch = Scratch::new();
    let bytes = scratch.bytes(WEIGHTS_FILE);
    // A file that is also a zip archive, which is read from its end.
    for behind in [
        &b"\0"[..],
        b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ] {
        let reason = scratch
            .weights(&[&bytes, behind].concat())
            .malformed(WEIGHTS_FILE);
        let (expected, found) = (192, 192 + behind.len());
        let more = behind.len();
        assert_eq!(
            reason,
            format!(
                "the header describes {expected} bytes of values, the file has {found}: {more} too many"
            )
        );
    }
    let mut file = OpenOptions::new()
        .append(true)
        .open(scratch.file(WEIGHTS_FILE))
        .unwrap();
    fs::write(scratch.file(WEIGHTS_FILE), &bytes).unwrap();
    assert!(scratch.read().is_ok());
    file.write_all(b" ").unwrap();
    assert!(scratch.read().is_err());
}
