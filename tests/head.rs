//! The loss and the log-probabilities of a head in chunks under everything that can be attached to it, against the plain ones of its logits.

use burn::module::{Lora, Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, LinearLayout};
use burn::tensor::{Bool, Device, Distribution, Gradients, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{
    HeadLoss, PeftConfig, PeftForward, PeftModel, TargetConfig, TiedHead, TrainableTokens,
};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::{
    HeadChunks, Labels, LogProbs, LogProbsConfig, SftLoss, head_log_probs, sft_head_loss, sft_loss,
};

const FEATURES: usize = 32;
const VOCABULARY: usize = 50;
const SHAPE: [usize; 2] = [3, 7];

#[derive(Module, Debug)]
struct Model {
    embed: Embedding,
    lm_head: Linear,
}

impl Model {
    fn new(layout: LinearLayout, device: &Device) -> Self {
        Self {
            embed: EmbeddingConfig::new(VOCABULARY, FEATURES).init(device),
            lm_head: LinearConfig::new(FEATURES, VOCABULARY)
                .with_layout(layout)
                .init(device),
        }
    }

    fn hidden(&self) -> Tensor<3> {
        let [batch, seq] = SHAPE;
        let device = self.devices()[0].clone();
        Tensor::random(
            [batch, seq, FEATURES],
            Distribution::Normal(0.0, 1.0),
            &device,
        )
    }
}

fn device() -> Device {
    Device::default().autodiff()
}

fn targets() -> Tensor<2, Int> {
    let [batch, seq] = SHAPE;
    let targets: Vec<i64> = (0..batch * seq)
        .map(|i| (i * 37 % VOCABULARY) as i64)
        .collect();
    Tensor::from_data(TensorData::new(targets, SHAPE), &device())
}

/// All positions, or two of three.
fn mask(all: bool) -> Tensor<2, Bool> {
    let [batch, seq] = SHAPE;
    let mask: Vec<bool> = (0..batch * seq).map(|i| all || i % 3 != 1).collect();
    Tensor::from_data(TensorData::new(mask, SHAPE), &device())
}

/// Adds noise to all that trains, so that fresh adapters change something.
struct Noise;

impl ModuleMapper for Noise {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        let value = param.val().detach();
        let noise = value.random_like(Distribution::Normal(0.0, 0.2));
        Param::initialized(param.id, (value + noise).detach().require_grad())
    }
}

/// The gradients of all parameters, in the order of the traversal.
struct Collect<'a> {
    gradients: &'a Gradients,
    found: Vec<Option<Vec<f64>>>,
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.base().grad(self.gradients);
        self.found.push(gradient.map(values));
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.try_into_vec_as::<f64>().unwrap()
}

/// The loss, its gradient of the hidden states, and those of the parameters.
fn run<M: Module>(
    model: &M,
    hidden: &Tensor<3>,
    loss: impl Fn(Tensor<3>) -> SftLoss,
) -> Vec<Option<Vec<f64>>> {
    let hidden = hidden.clone().detach().require_grad();
    let loss = loss(hidden.clone()).mean();
    let gradients = loss.backward();
    let mut collect = Collect {
        gradients: &gradients,
        found: vec![Some(values(loss)), hidden.grad(&gradients).map(values)],
    };
    model.visit(&mut collect);
    collect.found
}

/// Both losses with all their gradients, which a test may expect to be `trained` in number.
#[track_caller]
fn assert_equal(found: &[Option<Vec<f64>>], expected: &[Option<Vec<f64>>], trained: usize) {
    assert_eq!(found.len(), expected.len());
    let count = |all: &[Option<Vec<f64>>]| all.iter().flatten().count();
    assert_eq!(count(found), 2 + trained, "gradients in chunks");
    assert_eq!(count(expected), 2 + trained, "gradients of the plain loss");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let (Some(found), Some(expected)) = (found, expected) else {
            assert!(found.is_none() && expected.is_none(), "{i}");
            continue;
        };
        let size = expected.iter().fold(0.1, |most: f64, v| most.max(v.abs()));
        for (a, b) in found.iter().zip(expected) {
            // Two sums in f32 of less than a hundred terms, of which no one is ten times as large as the largest sum.
            assert!((a - b).abs() <= 1e-4 * size, "{i}: {a}, not {b}");
        }
    }
}

fn chunks() -> HeadChunks {
    HeadChunks::new(4, 12).unwrap()
}

const TEMPERATURE: f64 = 0.7;

/// Labels of three sequences: a response in each row, the first of which is the second too.
fn labels() -> Labels {
    let targets = targets().try_into_vec_as::<i64>().unwrap();
    let sequence = |positions: std::ops::Range<usize>| -> Vec<(usize, usize)> {
        positions
            .map(|position| (position, targets[position] as usize))
            .collect()
    };
    Labels::from_sequences(&[sequence(2..7), sequence(2..4), sequence(15..20)]).unwrap()
}

/// A number of the log-probabilities, entropies and means, in which each counts otherwise.
fn weighed([values, entropy, mean]: [Tensor<1>; 3]) -> SftLoss {
    let count = values.dims()[0];
    let weights = |first: f32| {
        let weights: Vec<f32> = (0..count).map(|i| (first + i as f32).sin()).collect();
        Tensor::<1>::from_floats(weights.as_slice(), &device())
    };
    let sum = values * weights(0.0) + entropy * weights(3.0) + mean * weights(5.0);
    SftLoss {
        sum: sum.sum(),
        count,
    }
}

fn in_chunks(log_probs: burn_peft::Result<LogProbs>) -> SftLoss {
    let log_probs = log_probs.unwrap();
    assert_eq!(log_probs.lens(), [5, 2, 5]);
    let (entropy, mean) = (log_probs.entropy.unwrap(), log_probs.mean.unwrap());
    weighed([log_probs.values, entropy, mean])
}

/// The same of logits.
fn of_logits(logits: Tensor<3>) -> SftLoss {
    let [batch, seq, vocabulary] = logits.dims();
    let positions = [2, 3, 4, 5, 6, 2, 3, 15, 16, 17, 18, 19];
    let rows = Tensor::<1, Int>::from_data(positions.map(|p: i64| p), &device());
    let logits = logits.reshape([batch * seq, vocabulary]).select(0, rows) / TEMPERATURE;
    let log_p = burn::tensor::activation::log_softmax(logits, 1);
    let tokens: Vec<i64> = labels().iter().map(i64::from).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [12, 1]), &device());
    let entropy = (log_p.clone().exp() * log_p.clone()).sum_dim(1).neg();
    let values = [log_p.clone().gather(1, tokens), entropy, log_p.mean_dim(1)];
    weighed(values.map(|column| column.reshape([12])))
}

fn log_probs_config() -> LogProbsConfig {
    LogProbsConfig::new()
        .with_chunks(chunks())
        .with_temperature(TEMPERATURE)
        .with_statistics(true)
}

#[track_caller]
fn check_linear<M: Module>(module: &M, model: &Model, trained: usize) {
    let hidden = model.hidden();
    for all in [true, false] {
        let found = run(module, &hidden, |hidden| {
            sft_head_loss(hidden, &model.lm_head, targets(), mask(all), &chunks()).unwrap()
        });
        let expected = run(module, &hidden, |hidden| {
            sft_loss(model.lm_head.forward_peft(hidden), targets(), mask(all)).unwrap()
        });
        assert_equal(&found, &expected, trained);
    }
    let found = run(module, &hidden, |hidden| {
        let config = log_probs_config();
        in_chunks(head_log_probs(hidden, &model.lm_head, &labels(), &config))
    });
    let expected = run(module, &hidden, |hidden| {
        of_logits(model.lm_head.forward_peft(hidden))
    });
    assert_equal(&found, &expected, trained);
}

#[track_caller]
fn check_tied<M: Module>(module: &M, model: &Model, trained: usize) {
    let hidden = model.hidden();
    for all in [true, false] {
        let found = run(module, &hidden, |hidden| {
            sft_head_loss(hidden, &model.embed, targets(), mask(all), &chunks()).unwrap()
        });
        let expected = run(module, &hidden, |hidden| {
            sft_loss(model.embed.attend_peft(hidden), targets(), mask(all)).unwrap()
        });
        assert_equal(&found, &expected, trained);
    }
    let found = run(module, &hidden, |hidden| {
        let config = log_probs_config();
        in_chunks(head_log_probs(hidden, &model.embed, &labels(), &config))
    });
    let expected = run(module, &hidden, |hidden| {
        of_logits(model.embed.attend_peft(hidden))
    });
    assert_equal(&found, &expected, trained);
}

fn on(lora: LoraConfig, target: &str) -> PeftConfig {
    PeftConfig::new(lora.with_alpha(5.0), TargetConfig::list([target]))
}

fn adapted(config: &PeftConfig) -> PeftModel<Model> {
    let mut model = PeftModel::new(Model::new(LinearLayout::Row, &device()));
    model.add_adapter("default", config).unwrap();
    model.map(&mut Noise)
}

#[test]
fn heads_that_are_trained_themselves() {
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let model = Model::new(layout, &device());
        check_linear(&model, &model, 2);
        check_tied(&model, &model, 1);
        let frozen = model.no_grad();
        check_linear(&frozen, &frozen, 0);
        check_tied(&frozen, &frozen, 0);
    }
}

#[test]
fn low_rank_changes_of_a_head() {
    for (config, trained) in [
        (LoraConfig::new(3), 2),
        (LoraConfig::new(3).with_freeze_a(true), 1),
        (LoraConfig::new(3).with_bias(true), 3),
    ] {
        let model = adapted(&on(config, "lm_head"));
        check_linear(&model, model.module(), trained);
        let off = model.disabled();
        check_linear(&off, off.module(), 0);
    }
}

#[test]
fn a_packed_head() {
    for double in [false, true] {
        let mut model = PeftModel::new(Model::new(LinearLayout::Row, &device()));
        let nf4 = Nf4Config::new().with_double_quant(double);
        model
            .quantize_nf4(&TargetConfig::list(["lm_head"]), &nf4)
            .unwrap();
        check_linear(&model, model.module(), 0);
        let config = on(LoraConfig::new(2), "lm_head");
        model.add_adapter("default", &config).unwrap();
        let model = model.map(&mut Noise);
        check_linear(&model, model.module(), 2);
    }
}

#[test]
fn several_adapters_at_once() {
    let mut model = adapted(&on(LoraConfig::new(3), "lm_head"));
    model
        .add_adapter("other", &on(LoraConfig::new(2).with_bias(true), "lm_head"))
        .unwrap();
    model
        .set_adapters(&[("default", 0.5), ("other", -2.0)])
        .unwrap();
    let model = model.map(&mut Noise);
    check_linear(&model, model.module(), 5);
}

#[test]
fn what_is_not_factored() {
    // The weight is composed once.
    let model = adapted(&on(LoraConfig::new(3).with_dora(true), "lm_head"));
    check_linear(&model, model.module(), 3);
    // Logits as a whole.
    let mut model = adapted(&on(LoraConfig::new(3).with_dora(true), "lm_head"));
    let biased = on(LoraConfig::new(2).with_bias(true), "lm_head");
    model.add_adapter("other", &biased).unwrap();
    model
        .set_adapters(&[("default", 1.0), ("other", 0.5)])
        .unwrap();
    let model = model.map(&mut Noise);
    check_linear(&model, model.module(), 6);
    let mut model = adapted(&on(LoraConfig::new(3), "lm_head"));
    model
        .add_adapter("other", &on(LoraConfig::new(2), "lm_head"))
        .unwrap();
    let model = model.map(&mut Noise);
    let rows = model
        .with_adapter_rows(&[Some("other"), None, Some("default")])
        .unwrap();
    check_linear(&rows, rows.module(), 0);
}

#[test]
fn values_of_an_adapters_own() {
    let copy = on(LoraConfig::new(2), "embed").with_modules_to_save(["lm_head"]);
    let model = adapted(&copy);
    // The copies of the weight and the bias; of the embedding's factors nothing is used.
    check_linear(&model, model.module(), 2);
    let copy = on(LoraConfig::new(2), "lm_head").with_modules_to_save(["embed"]);
    let model = adapted(&copy.clone().with_ensure_weight_tying(true));
    check_tied(&model, model.module(), 1);
    // Without it, the copy is of the lookup alone.
    let model = adapted(&copy);
    check_tied(&model, model.module(), 0);
    let tokens = TrainableTokens::Input(vec![4, 30, 11]);
    let rows = on(LoraConfig::new(2), "lm_head").with_trainable_tokens(tokens);
    let model = adapted(&rows);
    check_tied(&model, model.module(), 1);
    let tokens =
        TrainableTokens::Named([("lm_head".to_owned(), vec![1, 49])].into_iter().collect());
    let mut model = PeftModel::new(Model::new(LinearLayout::Row, &device()));
    let rows = on(LoraConfig::new(2), "embed").with_trainable_tokens(tokens);
    model.add_adapter("default", &rows).unwrap();
    let model = model.map(&mut Noise);
    check_linear(&model, model.module(), 1);
}

#[test]
fn a_tied_head() {
    let model = adapted(&on(LoraConfig::new(3), "embed").with_ensure_weight_tying(true));
    check_tied(&model, model.module(), 2);
    let off = model.disabled();
    check_tied(&off, off.module(), 0);
    // Without it, the lookup changes alone.
    for dora in [false, true] {
        let model = adapted(&on(LoraConfig::new(3).with_dora(dora), "embed"));
        check_tied(&model, model.module(), 0);
    }
    // And the head alone, as a target of its own.
    for (dora, gradients) in [(false, 2), (true, 3)] {
        let model = PeftModel::new(Model::new(LinearLayout::Row, &device()));
        let mut model = model.with_head("tied").with_tied_head("embed");
        let config = on(LoraConfig::new(3).with_dora(dora), "tied");
        model.add_adapter("default", &config).unwrap();
        let model = model.map(&mut Noise);
        check_tied(&model, model.module(), gradients);
    }
}

#[test]
fn adapters_of_burns_own() {
    let model = Model::new(LinearLayout::Row, &device()).no_grad();
    let model = model.apply_lora(Lora::new(2, 4.0)).map(&mut Noise);
    check_linear(&model, &model, 2);
}

#[test]
fn dropout_of_an_adapter_acts() {
    let model = adapted(&on(LoraConfig::new(3).with_dropout(0.5), "lm_head"));
    let hidden = model.module().hidden();
    let loss = |model: &Model| {
        let loss = sft_head_loss(
            hidden.clone(),
            &model.lm_head,
            targets(),
            mask(true),
            &chunks(),
        );
        values(loss.unwrap().sum)[0]
    };
    assert_ne!(loss(model.module()), loss(model.module()));
    let inference = model.valid();
    let inner = hidden.clone().inner();
    let loss = |model: &Model| {
        let loss = sft_head_loss(
            inner.clone(),
            &model.lm_head,
            targets(),
            mask(true),
            &chunks(),
        );
        values(loss.unwrap().sum)[0]
    };
    assert_eq!(loss(inference.module()), loss(inference.module()));
}

#[test]
fn errors_are_those_of_the_plain_loss() {
    let model = Model::new(LinearLayout::Row, &device());
    let hidden = model.hidden();
    let loss = |hidden: &Tensor<3>, targets, mask| {
        sft_head_loss(hidden.clone(), &model.lm_head, targets, mask, &chunks()).unwrap_err()
    };
    let error = loss(&hidden, targets(), mask(true).bool_not());
    assert!(matches!(
        error,
        PeftError::NoSupervisedTokens { tokens: 21 }
    ));
    let error = loss(&hidden, targets() + 13, mask(true));
    assert!(
        matches!(
            error,
            PeftError::TokenRange {
                token: 50,
                vocabulary: VOCABULARY,
                ..
            }
        ),
        "{error}"
    );
    let error = loss(&hidden, targets().transpose(), mask(true));
    assert!(matches!(&error, PeftError::Shape { tensor, .. } if tensor == "targets"));
    let log_probs = |hidden: &Tensor<3>, labels: &Labels, temperature: f64| {
        let config = LogProbsConfig::new().with_temperature(temperature);
        head_log_probs(hidden.clone(), &model.lm_head, labels, &config).unwrap_err()
    };
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = log_probs(&hidden, &labels(), temperature).to_string();
        assert!(error.contains("temperature"), "{error}");
    }
    let outside = Labels::from_sequences(&[vec![(21, 3)]]).unwrap();
    let error = log_probs(&hidden, &outside, 1.0).to_string();
    assert!(error.contains("position 21"), "{error}");
    let narrow = hidden.clone().narrow(2, 0, 8);
    let error = log_probs(&narrow, &labels(), 1.0);
    assert!(matches!(&error, PeftError::Shape { tensor, .. } if tensor == "hidden"));
    let error = loss(&narrow, targets(), mask(true));
    assert!(matches!(&error, PeftError::Shape { tensor, .. } if tensor == "hidden"));
    assert_eq!(model.lm_head.head_dims(), [FEATURES, VOCABULARY]);
    assert_eq!(model.embed.head_dims(), [FEATURES, VOCABULARY]);
}
