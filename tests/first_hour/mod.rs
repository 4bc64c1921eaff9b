//! What a new user reads after a mistake: one message per mistake, held to `messages.txt`.
//!
//! A message says what is wrong, where, what was expected, and what to do. `UPDATE_SNAPSHOTS=1` rewrites the file:
//!
//! ```text
//! UPDATE_SNAPSHOTS=1 cargo test --release -p burn-peft-tests --test suite -- first_hour
//! ```

use std::fmt::Display;
use std::fs;
use std::path::Path;

use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use burn::tensor::{Distribution, FloatDType};
use burn_peft::dataset::{Instruction, TokenizeConfig, alpaca, read_json_lines};
use burn_peft::format::WriteOptions;
use burn_peft::objective::sft_loss;
use burn_peft::prelude::*;
use burn_peft::resume::{Checkpoint, Seed};

/// A model as a user would write it.
#[derive(Module, Debug)]
struct Model {
    layers: Vec<Block>,
    lm_head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    q_proj: Linear,
    v_proj: Linear,
}

/// A model whose call sites say `forward`.
impl Model {
    fn with(layers: usize, width: usize) -> Self {
        let device = Device::default().autodiff();
        let linear = |d_out| LinearConfig::new(width, d_out).init(&device);
        Self {
            layers: (0..layers)
                .map(|_| Block {
                    q_proj: linear(width),
                    v_proj: linear(width),
                })
                .collect(),
            lm_head: linear(8),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self
            .layers
            .iter()
            .fold(x, |x, block| block.v_proj.forward(block.q_proj.forward(x)));
        self.lm_head.forward(x)
    }
}

/// A model as the first page makes it, without an adapter.
fn model() -> PeftModel<Model> {
    PeftModel::new(Model::with(2, 64))
}

fn config() -> PeftConfig {
    PeftConfig::new(LoraConfig::new(4), TargetConfig::all_linear())
}

fn adapted() -> PeftModel<Model> {
    let mut model = model();
    model.add_adapter("default", &config()).unwrap();
    model
}

fn lora(lora: LoraConfig) -> PeftConfig {
    PeftConfig::new(lora, TargetConfig::all_linear())
}

fn targets(targets: TargetConfig) -> PeftConfig {
    PeftConfig::new(LoraConfig::new(4), targets)
}

fn x() -> Tensor<2> {
    let device = Device::default().autodiff();
    Tensor::random([2, 64], Distribution::Normal(0.0, 1.0), &device)
}

/// The messages, by what was done wrong.
struct Messages<'a> {
    scratch: &'a Path,
    text: String,
    /// Mistakes that were taken in silence.
    taken: Vec<String>,
}

impl Messages<'_> {
    fn heading(&mut self, heading: &str) {
        self.text += &format!("\n# {heading}\n");
    }

    /// A mistake that is an error.
    fn error<T, E: Display>(&mut self, mistake: &str, outcome: Result<T, E>) {
        match outcome {
            Ok(_) => self.taken.push(mistake.to_owned()),
            Err(error) => self.text(mistake, error.to_string()),
        }
    }

    /// A mistake that a report tells of.
    fn text(&mut self, mistake: &str, text: String) {
        let text = text.replace(self.scratch.to_str().unwrap(), "DIR");
        assert!(!text.is_empty(), "{mistake}");
        let text: Vec<_> = text.lines().collect();
        self.text += &format!("\n{mistake}\n    {}\n", text.join("\n    "));
    }
}

#[cfg(unix)]
#[test]
fn every_mistake_is_answered_as_in_the_snapshot() {
    let scratch = tempfile::tempdir().unwrap();
    let mut messages = Messages {
        scratch: scratch.path(),
        taken: Vec::new(),
        text: "What a mistake is answered with. Rewritten by UPDATE_SNAPSHOTS=1.\n".into(),
    };
    adding(&mut messages);
    packing(&mut messages);
    training(&mut messages);
    saving(&mut messages);
    loading(&mut messages);
    bases(&mut messages);
    data(&mut messages);
    resuming(&mut messages);

    let path = crate::repository().join("tests/first_hour/messages.txt");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, &messages.text).unwrap();
    }
    assert_eq!(messages.taken, Vec::<String>::new());
    let expected = fs::read_to_string(&path).unwrap();
    for (found, expected) in messages.text.lines().zip(expected.lines()) {
        assert_eq!(
            found, expected,
            "if it is better so, set UPDATE_SNAPSHOTS=1"
        );
    }
    assert_eq!(messages.text, expected);
}

fn adding(messages: &mut Messages) {
    messages.heading("Adding an adapter");
    let mut add = |mistake: &str, config: PeftConfig| {
        let mut model = model();
        let before = model.report();
        let outcome = model.add_adapter("default", &config);
        messages.error(mistake, outcome);
        assert_eq!(model.report(), before, "{mistake}");
    };
    add(
        "a target that the model does not have",
        targets(TargetConfig::list(["query", "v_proj"])),
    );
    add(
        "a target of another family",
        targets(TargetConfig::list(["c_attn"])),
    );
    add(
        "an expression that matches nothing",
        targets(TargetConfig::regex(r".*\.attn\.q")),
    );
    add(
        "an expression that is none",
        targets(TargetConfig::regex("(q_proj")),
    );
    add(
        "no target",
        targets(TargetConfig::list(Vec::<String>::new())),
    );
    add(
        "everything excluded",
        targets(TargetConfig::list(["q_proj"]).with_exclude_modules(["q_proj"])),
    );
    add(
        "a layer that the model does not have",
        targets(TargetConfig::list(["q_proj"]).with_layers_to_transform([7])),
    );
    add("rank 0", lora(LoraConfig::new(0)));
    add("alpha NaN", lora(LoraConfig::new(4).with_alpha(f64::NAN)));
    add("dropout 1", lora(LoraConfig::new(4).with_dropout(1.0)));
    add(
        "factors in F64, which no file of an adapter holds",
        lora(LoraConfig::new(4).with_dtype(FloatDType::F64)),
    );
    add(
        "a saved module that the model does not have",
        config().with_modules_to_save(["score"]),
    );
    add(
        "trained tokens in a model without an embedding",
        config().with_trainable_tokens(TrainableTokens::Input(vec![0])),
    );
    for name in ["", "a/b", "../a", "lora.1"] {
        let outcome = model().add_adapter(name, &config());
        messages.error(&format!("an adapter called {name:?}"), outcome);
    }
    messages.error(
        "the same name twice",
        adapted().add_adapter("default", &config()),
    );
    messages.error(
        "using an adapter that is not there",
        adapted().set_adapter("sql"),
    );
    messages.error(
        "deleting from a model without adapters",
        model().delete_adapter("default"),
    );
}

fn packing(messages: &mut Messages) {
    messages.heading("Packing");
    let all = TargetConfig::all_linear();
    let mut twice = model();
    twice.quantize_nf4(&all, &Nf4Config::new()).unwrap();
    messages.error("packing twice", twice.quantize_nf4(&all, &Nf4Config::new()));
    let outcome = model().quantize_nf4(&TargetConfig::list(["dense"]), &Nf4Config::new());
    messages.error("packing what is not there", outcome);
    let outcome = burn_peft::nf4::BlockSize::new(48);
    messages.error("a block size of 48", outcome);
    let mut broken = Model::with(1, 64);
    let device = Device::default().autodiff();
    let weight = Tensor::<2>::full([64, 64], f32::NAN, &device);
    broken.layers[0].q_proj.weight = burn::module::Param::from_tensor(weight);
    let outcome = PeftModel::new(broken).quantize_nf4(&all, &Nf4Config::new());
    messages.error("packing a weight with NaN", outcome);
}

fn training(messages: &mut Messages) {
    messages.heading("Training");
    let model = adapted();
    model.forward(x());
    messages.text(
        "a forgotten `forward_peft`: model.status()",
        model.status().to_string(),
    );
    let loss = (model.forward(x()) * f32::NAN).mean();
    messages.error("a loss of NaN", check_loss(&loss, 3));
    let mut gradients = GradientsParams::from_grads(loss.backward(), &model);
    let outcome = clip_grad_norm(&model, &mut gradients, 1.0);
    messages.error(
        "a gradient of NaN",
        outcome.map_err(|error| error.at_step(3)),
    );
    let mut gradients = GradientsParams::new();
    messages.error("clipping to 0", clip_grad_norm(&model, &mut gradients, 0.0));
    let (logits, targets) = (
        Tensor::<3>::zeros([1, 2, 4], &Device::default()),
        Tensor::<2, Int>::from_data([[1, -100]], &Device::default()),
    );
    let mask = |mask| Tensor::<2, Bool>::from_data([mask], &Device::default());
    let outcome = sft_loss(logits.clone(), targets.clone(), mask([true, true]));
    messages.error("PyTorch's -100 as a target", outcome);
    let outcome = sft_loss(logits.clone(), targets.clone(), mask([false, false]));
    messages.error("a mask that is false everywhere", outcome);
    let wrong = Tensor::<3>::zeros([2, 2, 4], &Device::default());
    let outcome = sft_loss(wrong, targets, mask([true, true]));
    messages.error("logits of another batch", outcome);
}

fn saving(messages: &mut Messages) {
    messages.heading("Saving");
    let scratch = messages.scratch;
    let file = scratch.join("a_file");
    fs::write(&file, "content").unwrap();
    let options = SaveOptions::default();
    messages.error("checking a folder that is a file", check_writable(&file));
    messages.error(
        "checking a folder below a file",
        check_writable(file.join("adapter")),
    );
    let outcome = adapted().save_adapter("default", &file, &options);
    messages.error("saving into a file", outcome);
    let outcome = adapted().save_adapter("sql", scratch.join("saved"), &options);
    messages.error("saving an adapter that is not there", outcome);
    let dir = scratch.join("other");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("adapter_config.json"), "{}").unwrap();
    let outcome = adapted().save_adapter("default", &dir, &options);
    messages.error("saving over a file that is no adapter's", outcome);
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    assert_eq!(
        fs::read_to_string(dir.join("adapter_config.json")).unwrap(),
        "{}"
    );
    assert!(!scratch.join("saved").exists());
}

fn loading(messages: &mut Messages) {
    messages.heading("Loading an adapter");
    let scratch = messages.scratch;
    let options = LoadOptions::default();
    let dir = scratch.join("adapter");
    adapted()
        .save_adapter("default", &dir, &options_of_saving())
        .unwrap();
    let mut load = |mistake: &str, mut model: PeftModel<Model>, dir: &Path| {
        let before = model.report();
        messages.error(mistake, model.load_adapter("default", dir, &options));
        assert_eq!(model.report(), before, "{mistake}");
    };
    load("a folder that is not there", model(), &scratch.join("none"));
    load("a folder without an adapter", model(), scratch);
    load(
        "the file in place of its folder",
        model(),
        &dir.join("adapter_config.json"),
    );
    load("a name that is taken", adapted(), &dir);
    load("a smaller model", PeftModel::new(Model::with(1, 64)), &dir);
    load("a wider model", PeftModel::new(Model::with(2, 128)), &dir);
    let weights = dir.join("adapter_model.safetensors");
    let content = fs::read(&weights).unwrap();
    fs::write(&weights, &content[..content.len() / 2]).unwrap();
    load("a download that was cut off", model(), &dir);
    fs::write(
        &weights,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 133\n",
    )
    .unwrap();
    load("a pointer of git-lfs", model(), &dir);
    fs::remove_file(&weights).unwrap();
    load("a configuration without tensors", model(), &dir);
    fs::write(dir.join("adapter_config.json"), r#"{"peft_type": "IA3"}"#).unwrap();
    load("another method", model(), &dir);
}

/// The options of the quick start.
fn options_of_saving() -> SaveOptions {
    SaveOptions::default()
}

fn bases(messages: &mut Messages) {
    messages.heading("Loading a base model");
    let scratch = messages.scratch;
    let dir = scratch.join("base");
    model().save_base(&dir, &Default::default()).unwrap();
    let mut load =
        |mistake: &str, mut model: PeftModel<Model>, dir: &Path, options: &BaseOptions| {
            messages.error(mistake, model.load_base(dir, options));
        };
    let options = BaseOptions::new();
    load(
        "a folder that is not there",
        model(),
        &scratch.join("none"),
        &options,
    );
    load("a folder without a model", model(), scratch, &options);
    load(
        "a smaller model",
        PeftModel::new(Model::with(1, 64)),
        &dir,
        &options,
    );
    load(
        "a wider model",
        PeftModel::new(Model::with(2, 128)),
        &dir,
        &options,
    );
    let prefix = NameMap::new().with_prefix("model.", "");
    load(
        "names with a prefix that the file does not have",
        model(),
        &dir,
        &BaseOptions::new().with_names(prefix),
    );
}

fn data(messages: &mut Messages) {
    messages.heading("Data");
    let path = messages.scratch.join("train.jsonl");
    let mut read = |mistake: &str, text: &str| {
        fs::write(&path, text).unwrap();
        messages.error(mistake, read_json_lines::<Instruction>(&path));
    };
    read(
        "another key",
        "{\"prompt\": \"Do.\", \"response\": \"Done.\"}\n",
    );
    read("no JSON", "instruction,response\n");
    let triple = Instruction {
        instruction: "Do.".into(),
        input: String::new(),
        response: "Done.".into(),
    };
    let tokens = |text: &str| Ok::<_, std::io::Error>(text.bytes().map(u32::from).collect());
    let outcome = TokenizeConfig::new()
        .with_max_tokens(16)
        .tokenize(&alpaca(&triple), tokens);
    messages.error("a limit that is too small", outcome);
    let fails = |_: &str| Err::<Vec<u32>, _>(std::io::Error::other("no such token"));
    let outcome = TokenizeConfig::new().tokenize(&alpaca(&triple), fails);
    messages.error("a tokenizer that fails", outcome);
}

fn resuming(messages: &mut Messages) {
    messages.heading("Resuming");
    let path = messages.scratch.join("run");
    let optimizer = || AdamWConfig::new().init();
    let place = Checkpoint {
        seed: Seed(0),
        step: 3,
    };
    let options = WriteOptions::default();
    place
        .save(&path, &adapted(), &optimizer(), &options)
        .unwrap();
    let outcome = place.save(&path, &adapted(), &optimizer(), &options);
    messages.error("a checkpoint over another", outcome);
    let mut other = model();
    other
        .add_adapter("default", &lora(LoraConfig::new(8)))
        .unwrap();
    let outcome = Checkpoint::load(&path, &mut other, &mut optimizer());
    messages.error("a checkpoint of another rank", outcome);
    let outcome = Checkpoint::load(&path, &mut model(), &mut optimizer());
    messages.error("a checkpoint for a model without its adapter", outcome);
    let outcome = Checkpoint::load(
        path.with_extension("none"),
        &mut adapted(),
        &mut optimizer(),
    );
    messages.error("a checkpoint that is not there", outcome);
    fs::write(&path, "no checkpoint").unwrap();
    let outcome = Checkpoint::load(&path, &mut adapted(), &mut optimizer());
    messages.error("a file that is no checkpoint", outcome);
}
