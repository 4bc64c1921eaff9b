//! The optional digest, through a whole model: who reads such files, and what it finds that nothing else does.

use std::fs;

use burn_peft::PeftError;
use burn_peft::format::{
    AdapterFile, CONFIG_FILE, DigestCheck, ReadOptions, SaveOptions, WEIGHTS_FILE,
};
use safetensors::SafeTensors;

use super::victim::Victim;
use super::{Scratch, adapter};

fn read(scratch: &Scratch, digest: DigestCheck) -> Result<AdapterFile, PeftError> {
    let options = ReadOptions {
        digest,
        ..Default::default()
    };
    AdapterFile::read(scratch.path(), &options)
}

#[test]
fn files_with_a_digest_are_those_without_but_for_an_entry_of_the_metadata() {
    let (with, without) = (Scratch::of(&adapter(0.5), true), Scratch::new());
    assert_eq!(with.bytes(CONFIG_FILE), without.bytes(CONFIG_FILE));
    let (with_bytes, without_bytes) = (with.bytes(WEIGHTS_FILE), without.bytes(WEIGHTS_FILE));
    assert_ne!(with_bytes, without_bytes);
    let tensors = |bytes| {
        let file = SafeTensors::deserialize(bytes).unwrap();
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors
    };
    assert_eq!(tensors(&with_bytes), tensors(&without_bytes));
    let (_, header) = SafeTensors::read_metadata(&with_bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!((metadata.len(), metadata["format"].as_str()), (2, "pt"));
    assert_eq!(
        metadata["burn_peft.digest"].len(),
        "burn_peft:sha256:".len() + 64
    );
    assert_eq!(
        read(&with, DigestCheck::Require).unwrap(),
        read(&without, DigestCheck::IfPresent).unwrap()
    );
}

#[test]
fn a_digest_is_written_when_asked_for_and_checked_when_there_or_required() {
    let dir = tempfile::tempdir().unwrap();
    let victim = Victim::new();
    let save = |digest| {
        let options = SaveOptions {
            digest,
            overwrite: true,
            ..Default::default()
        };
        victim
            .model
            .save_adapter("kept", dir.path(), &options)
            .unwrap()
    };
    let required = ReadOptions {
        digest: DigestCheck::Require,
        ..Default::default()
    };
    let place = save(false);
    let error = AdapterFile::read(&place, &required).unwrap_err();
    assert!(
        matches!(&error, PeftError::Digest { path, .. } if path.ends_with(WEIGHTS_FILE)),
        "{error}"
    );
    assert!(AdapterFile::read(&place, &ReadOptions::default()).is_ok());
    save(true);
    assert!(AdapterFile::read(&place, &required).is_ok());
}

/// Two adapters of the same shapes: nothing else tells that the tensors of one stand beside the alpha of the other.
// S3
#[test]
fn tensors_and_a_configuration_that_do_not_belong_together_are_refused() {
    for digest in [false, true] {
        let (one, two) = (
            Scratch::of(&adapter(0.5), digest),
            Scratch::of(&adapter(0.75), digest),
        );
        fs::copy(two.file(CONFIG_FILE), one.file(CONFIG_FILE)).unwrap();
        match digest {
            false => assert_eq!(one.read().unwrap().config.lora_alpha, 0.75),
            true => {
                let error = one.refused();
                assert!(
                    matches!(&error, PeftError::Digest { path, .. } if *path == one.file(WEIGHTS_FILE)),
                    "{error}"
                );
                assert!(read(&one, DigestCheck::Ignore).is_ok());
            }
        }
    }
}
