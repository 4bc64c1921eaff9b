//! Every truncation, and every byte changed: an error, or exactly what the bytes now say, as other readers understand
//! them. With a digest, always an error.

use std::fs;

use burn::tensor::TensorData;
use burn_peft::PeftError;
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, LoraTensors, ReadOptions, WEIGHTS_FILE,
};
use burn_peft::model::{TargetConfig, TargetModules};
use safetensors::SafeTensors;
use serde_json::Value;

use super::victim::{Victim, noise};
use super::{Scratch, adapter, long, module};

/// An adapter as small as they get.
fn tiny() -> AdapterFile {
    AdapterFile::new(
        AdapterConfig::new(1, 2.0, TargetConfig::list(["q"])),
        vec![module("q", 1, [2, 2], 0.5)],
    )
}

/// The bytes that stand in for `byte` at `place`: all, or each bit flipped and some more.
fn others(byte: u8, place: usize) -> Vec<u8> {
    if long() {
        return (0..=255).filter(|&other| other != byte).collect();
    }
    let flipped = (0..8).map(|bit| byte ^ 1 << bit);
    // What JSON gives a meaning, one of them at each place, and one that depends on the place.
    let meant = b"\"\\{}[],:0-.eE \n"[place % 15];
    let mut others: Vec<_> = flipped.chain([meant, (place * 37 % 251) as u8]).collect();
    others.retain(|&other| other != byte);
    others
}

/// Runs `check` on every such change of `bytes` and returns how many there were.
fn each_change(bytes: &[u8], mut check: impl FnMut(usize, &[u8])) -> usize {
    let mut changed = bytes.to_vec();
    let mut cases = 0;
    for (place, &byte) in bytes.iter().enumerate() {
        for other in others(byte, place) {
            changed[place] = other;
            check(place, &changed);
            cases += 1;
        }
        changed[place] = byte;
    }
    cases
}

#[test]
fn a_truncated_file_is_refused_at_every_byte() {
    for digest in [false, true] {
        let scratch = Scratch::in_memory(&tiny(), digest);
        for file in [WEIGHTS_FILE, CONFIG_FILE] {
            let bytes = scratch.bytes(file);
            for end in 0..bytes.len() {
                fs::write(scratch.file(file), &bytes[..end]).unwrap();
                let error = scratch.read().unwrap_err().to_string();
                assert!(error.contains(file), "{end}: {error}");
            }
            fs::write(scratch.file(file), &bytes).unwrap();
        }
        assert!(scratch.read().is_ok());
    }
    // And into a model, which stays as it was.
    let scratch = Scratch::in_memory(&adapter(0.5), false);
    let bytes = scratch.bytes(WEIGHTS_FILE);
    for end in (0..bytes.len()).step_by(if long() { 1 } else { 61 }) {
        scratch.weights(&bytes[..end]).malformed(WEIGHTS_FILE);
    }
}

/// The tensors as the `safetensors` crate has them, under the names that any of the writers may give them.
fn independent(bytes: &[u8]) -> Vec<LoraTensors> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    assert_eq!(file.len(), 2);
    let mut names = file.names();
    names.sort_by_key(|name| name.to_lowercase());
    let [a, b] = names[..] else { unreachable!() };
    assert!(a.to_lowercase().contains("lora_a") && b.to_lowercase().contains("lora_b"));
    let data = |name: &str| {
        let view = file.tensor(name).unwrap();
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => burn::tensor::DType::F32,
            safetensors::Dtype::BF16 => burn::tensor::DType::BF16,
            safetensors::Dtype::F16 => burn::tensor::DType::F16,
            other => panic!("{other}"),
        };
        TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype)
    };
    let path = a.strip_prefix("base_model.model.").unwrap_or(a);
    let path = path.split('.').next().unwrap();
    vec![LoraTensors::new(path, data(a), data(b))]
}

#[test]
fn a_changed_byte_of_the_tensors_is_refused_or_read_as_it_stands() {
    let scratch = Scratch::in_memory(&tiny(), false);
    let original = scratch.read().unwrap();
    let bytes = scratch.bytes(WEIGHTS_FILE);
    let (mut read, mut values) = (0, 0);
    let _noise = noise();
    let cases = each_change(&bytes, |place, changed| {
        scratch.weights(changed);
        match scratch.read() {
            Ok(found) => {
                read += 1;
                assert_eq!(found.config, original.config);
                assert_eq!(found.tensors, independent(changed), "byte {place}");
                // A changed value is another value, and only one.
                if place >= bytes.len() - 16 {
                    values += 1;
                    assert_ne!(found.tensors, original.tensors, "byte {place}");
                }
            }
            Err(error) => assert!(error.to_string().contains(WEIGHTS_FILE), "{error}"),
        }
    });
    println!("{cases} changed bytes, {read} of them read, {values} as other values");
    assert!(
        values > 16 * 5 && read < cases / 2,
        "{values}, {read} of {cases}"
    );
}

/// What the text says, or `None` where it is no configuration, by rules written anew.
fn says(text: &[u8]) -> Option<(usize, f64, f64, bool, Vec<String>)> {
    let value: Value = serde_json::from_slice(text).ok()?;
    let or = |key: &str, default: Value| match &value[key] {
        Value::Null => default,
        value => value.clone(),
    };
    let targets = value["target_modules"].as_array()?;
    let targets = targets.iter().map(|name| name.as_str().map(str::to_owned));
    Some((
        or("r", 8.into()).as_u64()? as usize,
        or("lora_alpha", 8.into()).as_f64()?,
        or("lora_dropout", 0.into()).as_f64()?,
        or("use_rslora", false.into()).as_bool()?,
        targets.collect::<Option<_>>()?,
    ))
}

#[test]
fn a_changed_byte_of_the_configuration_is_refused_or_read_as_it_stands() {
    let scratch = Scratch::in_memory(&tiny(), false);
    let text = scratch.bytes(CONFIG_FILE);
    let mut read = 0;
    let _noise = noise();
    let cases = each_change(&text, |place, changed| {
        match AdapterConfig::from_json(changed, &ReadOptions::default()) {
            Ok(config) => {
                read += 1;
                let TargetModules::List(targets) = config.targets.target_modules.clone() else {
                    panic!("byte {place}: {:?}", config.targets)
                };
                let found = (
                    config.r,
                    config.lora_alpha,
                    config.lora_dropout,
                    config.use_rslora,
                    targets,
                );
                assert_eq!(Some(found), says(changed), "byte {place}");
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
    println!("{cases} changed bytes, {read} of them read");
    assert!(read > 100 && read < cases / 2, "{read} of {cases}");
}

#[test]
fn with_a_digest_every_changed_byte_of_either_file_is_refused() {
    let scratch = Scratch::in_memory(&tiny(), true);
    assert!(scratch.read().is_ok());
    let _noise = noise();
    let (mut by_digest, mut cases) = (0, 0);
    for file in [WEIGHTS_FILE, CONFIG_FILE] {
        let bytes = scratch.bytes(file);
        cases += each_change(&bytes, |place, changed| {
            fs::write(scratch.file(file), changed).unwrap();
            match scratch.read() {
                Ok(_) => panic!("{file}, byte {place}: {:?}", changed[place] as char),
                Err(PeftError::Digest { .. }) => by_digest += 1,
                Err(error) => assert!(error.to_string().contains("adapter_"), "{error}"),
            }
        });
        fs::write(scratch.file(file), &bytes).unwrap();
    }
    println!("{cases} changed bytes, {by_digest} of them known by the digest alone");
    assert!(by_digest > cases / 10, "{by_digest} of {cases}");
    assert!(scratch.read().is_ok());
}

/// A byte here and there, into a model: what is refused leaves it as it was, what is read does what it says.
#[test]
fn a_changed_byte_never_leaves_a_part_of_an_adapter_on_a_model() {
    let scratch = Scratch::in_memory(&adapter(0.5), false);
    for file in [WEIGHTS_FILE, CONFIG_FILE] {
        let bytes = scratch.bytes(file);
        for place in (0..bytes.len()).step_by(if long() { 3 } else { 101 }) {
            let mut changed = bytes.clone();
            changed[place] ^= 1 << (place % 8);
            fs::write(scratch.file(file), &changed).unwrap();
            if scratch.read().is_err() {
                scratch.refused();
                continue;
            }
            let mut victim = Victim::new();
            match victim.load(scratch.path()) {
                Ok(report) => {
                    assert_eq!(report.loaded.len(), 4);
                    assert_eq!(victim.model.factors("other").unwrap().len(), 2);
                }
                Err(_) => drop(scratch.refused()),
            }
        }
        fs::write(scratch.file(file), &bytes).unwrap();
    }
}
