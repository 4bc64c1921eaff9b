//! `adapter_model.safetensors` from any bytes, beside a configuration that is right.

use std::cell::RefCell;
use std::fs;

use burn::tensor::TensorData;
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, LoraTensors, ReadOptions, WEIGHTS_FILE, WriteOptions,
    tensor_key,
};
use burn_peft::model::TargetConfig;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::json;
use tempfile::TempDir;

fn adapter(dtype: burn::tensor::DType, dora: bool) -> AdapterFile {
    let values = |n: usize| (0..n).map(|i| i as f32 / 8.0).collect::<Vec<_>>();
    let module = |path: &str| {
        let mut module = LoraTensors::new(
            path,
            TensorData::new(values(6), [2, 3]).convert_dtype(dtype),
            TensorData::new(values(8), [4, 2]).convert_dtype(dtype),
        );
        module.magnitude = dora.then(|| TensorData::new(values(4), [4]).convert_dtype(dtype));
        module
    };
    AdapterFile::new(
        AdapterConfig::new(2, 4.0, TargetConfig::list(["q"])).with_use_dora(dora),
        ["a.q", "b.q"].map(module).into(),
    )
}

/// Tensors of all kinds that an adapter may have.
const EVERY_KIND: [(&str, &[usize]); 10] = [
    ("base_model.model.a.q.lora_A.weight", &[2, 3]),
    ("base_model.model.a.q.lora_B.weight", &[2, 2]),
    ("base_model.model.a.q.lora_B.bias", &[2]),
    ("base_model.model.a.conv.lora_A.weight", &[2, 1, 1, 1]),
    ("base_model.model.a.conv.lora_B.weight", &[3, 2, 1, 1]),
    ("base_model.model.a.conv.lora_B.bias", &[3]),
    ("base_model.model.embed.lora_embedding_A", &[2, 4]),
    ("base_model.model.embed.lora_embedding_B", &[3, 2]),
    ("base_model.model.head.weight", &[2, 3]),
    (
        "base_model.model.embed.token_adapter.trainable_tokens_delta",
        &[2, 3],
    ),
];

/// Files with and without a digest, of three types, with magnitudes.
pub fn seeds() -> Vec<Vec<u8>> {
    use burn::tensor::DType::{BF16, F16, F32};

    let all = EVERY_KIND.map(|(name, shape)| {
        let bytes = &[0; 64][..4 * shape.iter().product::<usize>()];
        (
            name,
            TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap(),
        )
    });
    let all = safetensors::serialize(all, None).unwrap();
    [(F32, false), (BF16, false), (F16, true)]
        .into_iter()
        .flat_map(|(dtype, dora)| {
            [false, true].map(|digest| {
                let dir = tempfile::tempdir().unwrap();
                let options = WriteOptions {
                    digest,
                    ..Default::default()
                };
                adapter(dtype, dora).write(dir.path(), &options).unwrap();
                fs::read(dir.path().join(WEIGHTS_FILE)).unwrap()
            })
        })
        .chain([all])
        .collect()
}

thread_local! {
    /// Three directories, whose configurations are without and with DoRA's magnitude and with all else that has tensors,
    /// and one to write to.
    static DIRS: RefCell<Option<[TempDir; 4]>> = const { RefCell::new(None) };
}

/// A directory in memory where the system has a place for that: some disks keep who writes a file again waiting.
fn in_memory() -> TempDir {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    dir.unwrap()
}

/// What was read is what another reader finds under the same names, and is read again from what is written of it.
pub fn check(input: &[u8]) -> String {
    DIRS.with_borrow_mut(|dirs| {
        let dirs = dirs.get_or_insert_with(|| {
            [(false, false), (true, false), (false, true), (false, false)].map(|(dora, all)| {
                let dir = in_memory();
                let plain = adapter(burn::tensor::DType::F32, dora);
                plain.write(dir.path(), &WriteOptions::default()).unwrap();
                if all {
                    let config = json!({
                        "peft_type": "LORA", "r": 2, "target_modules": ["q"], "lora_bias": true, "bias": "all",
                        "modules_to_save": ["head"], "trainable_token_indices": {"embed": [0, 3]},
                        "target_parameters": ["experts.down_proj", "experts.up_proj"],
                    });
                    let file = dir.path().join(CONFIG_FILE);
                    fs::write(&file, config.to_string()).unwrap();
                    AdapterConfig::read(&file, &ReadOptions::default()).unwrap();
                }
                dir
            })
        });
        let [plain, dora, all, out] = dirs;
        let plain = check_in(input, plain, Some(out));
        let dora = check_in(input, dora, Some(out));
        let all = check_in(input, all, None);
        format!("{plain} | {dora} | {all}")
    })
}

/// Where there is a directory to write to, nothing but factors is demanded of the file.
fn check_in(input: &[u8], dir: &TempDir, out: Option<&TempDir>) -> String {
    fs::write(dir.path().join(WEIGHTS_FILE), input).unwrap();
    let found = match AdapterFile::read(dir.path(), &ReadOptions::default()) {
        Ok(found) => found,
        Err(error) => {
            let text = error.to_string();
            assert!(!text.contains(char::is_control), "{text:?}");
            let file = [WEIGHTS_FILE, CONFIG_FILE]
                .into_iter()
                .find_map(|file| text.split_once(file));
            return file.expect("the file is named").1.to_owned();
        }
    };
    let file = SafeTensors::deserialize(input).expect("what is read is safetensors");
    let Some(out) = out else {
        return format!(
            "read, {} copies, {} rows",
            found.copies.len(),
            found.rows.len()
        );
    };
    let tensors = found
        .tensors
        .iter()
        .flat_map(|module| module.iter().map(move |tensor| (module, tensor)));
    let mut count = 0;
    for (module, (factor, data)) in tensors {
        count += 1;
        // Those that another writer has named are compared by their sizes below.
        if let Ok(view) = file.tensor(&tensor_key(&module.path, factor)) {
            assert_eq!(view.shape(), data.shape().as_slice());
            assert_eq!(view.data(), data.as_bytes());
        }
    }
    assert_eq!(count, file.len());
    let read = found.tensors.iter().flat_map(LoraTensors::iter);
    let read: usize = read.map(|(_, data)| data.as_bytes().len()).sum();
    let views = file.tensors();
    let there: usize = views.iter().map(|(_, view)| view.data().len()).sum();
    assert_eq!(read, there);

    // The targets need not name what there is; those that are written must.
    let mut again = found.clone();
    again.config.targets =
        TargetConfig::list(again.tensors.iter().map(|module| module.path.clone()));
    let options = WriteOptions {
        overwrite: true,
        digest: input.len().is_multiple_of(2),
        ..Default::default()
    };
    again
        .write(out.path(), &options)
        .expect("what is read is written");
    let written = AdapterFile::read(out.path(), &ReadOptions::default()).expect("and read again");
    assert_eq!(written.tensors, found.tensors);
    format!("read, {count} tensors of {:?}", found.tensors[0].a.dtype())
}
