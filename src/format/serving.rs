//! What a serving system will make of an adapter.
//!
//! A server may refuse a part of an adapter, or pass over it and answer otherwise than the adapter was trained to. Known here, as
//! of vLLM 0.12 (`lora/peft_helper.py`, `lora/utils.py`, `lora/lora_model.py`) and of llama.cpp in autumn 2026
//! (`convert_lora_to_gguf.py`, `src/llama-adapter.cpp`):
//!
//! | part | vLLM | llama.cpp |
//! |---|---|---|
//! | DoRA's magnitudes | refused | refused |
//! | a bias of `B` (`lora_bias`) | refused | refused |
//! | copies of modules or biases, rows of embeddings | refused | refused; copies of norms are dropped without a word |
//! | experts in one tensor (`target_parameters`) | dropped without a word, or refused, unless the model declares such experts | refused |
//! | base values of embeddings and heads (`base_layer`) | dropped without a word: the served base must have them | the same; refused where their key has no `base_layer` |
//! | embeddings | models that list them | taken |
//! | convolutions | refused | refused |
//! | a scale `s` that differs by module (`alpha_pattern`, `rank_pattern`) | one for all: `lora_alpha` and `r` | `lora_alpha` over the rank of each module |
//! | rsLoRA | honoured | `lora_alpha/r` all the same |
//! | rank | at most 512, and as started with | any |
//! | the output head | models that list it | not where it is the embedding |
//!
//! vLLM reads factors of experts by PEFT's layout of one of its versions, and drops or refuses them for most models: its pull requests 41384,
//! 47088, 52194 and 52198.

use super::adapter::AdapterFile;
use super::config::is_embedding;
use super::fit::around_of;
use super::keys::{Around, Factor, base_key, tensor_key};
use crate::Result;

/// Largest rank that vLLM can be started with.
const VLLM_MAX_RANK: usize = 512;

/// A system that serves models with adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// [vLLM](https://github.com/vllm-project/vllm), which reads PEFT's directory.
    Vllm,
    /// [llama.cpp](https://github.com/ggml-org/llama.cpp), by way of its converter to GGUF.
    LlamaCpp,
}

/// What becomes of a part of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server does not load the adapter.
    Refused,
    /// The server loads it, and its answers are others than were trained.
    Wrong,
    /// It depends on the model, or on how the server is started.
    Depends,
}

/// A part of an adapter that a server cannot take as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The key of the configuration, the tensor or the module.
    pub part: String,
    /// What becomes of it.
    pub outcome: Outcome,
    /// Why, and what helps.
    pub reason: String,
}

impl AdapterFile {
    /// The parts of this adapter that `server` cannot take, or would not take as they were trained; none if it can serve it.
    ///
    /// # Errors
    ///
    /// Those of [`AdapterConfig::validate`](super::AdapterConfig::validate).
    pub fn obstacles(&self, server: Server) -> Result<Vec<Obstacle>> {
        let matcher = self.config.validate()?;
        let mut obstacles = Vec::new();
        let mut add = |part: &str, outcome, reason: String| {
            obstacles.push(Obstacle {
                part: part.into(),
                outcome,
                reason,
            });
        };
        let (r, alpha, rslora) = (
            self.config.r,
            self.config.lora_alpha,
            self.config.use_rslora,
        );
        if rslora && server == Server::LlamaCpp {
            let reason = "it scales by lora_alpha/r; write α·√r as lora_alpha, without rsLoRA";
            add("use_rslora", Outcome::Wrong, reason.into());
        }
        let (norms, copies): (Vec<_>, Vec<_>) = self
            .copies
            .iter()
            .partition(|copy| server == Server::LlamaCpp && is_norm_of_llama_cpp(&copy.path));
        for norm in norms {
            let reason =
                "its converter takes the copy, and its server passes over it; merge the adapter";
            add(&norm.path, Outcome::Wrong, reason.into());
        }
        self.add_base_values(server, &mut add);
        let whole = copies
            .iter()
            .map(|copy| (&copy.path, "modules_to_save, bias"));
        let whole = whole.chain(
            self.rows
                .iter()
                .map(|rows| (&rows.path, "trainable_token_indices")),
        );
        for (path, option) in whole {
            let reason = format!("`{option}`: only low-rank changes are served; merge the adapter");
            add(path, Outcome::Refused, reason);
        }
        for tensors in &self.tensors {
            let path = &tensors.path;
            if tensors.experts {
                let (outcome, reason) = match server {
                    Server::Vllm => (
                        Outcome::Wrong,
                        "factors of experts in one tensor (`target_parameters`) are dropped without a word, or refused, unless the model \
                         declares such experts; merge the adapter",
                    ),
                    Server::LlamaCpp => (
                        Outcome::Refused,
                        "factors of experts in one tensor (`target_parameters`) are not supported; merge the adapter",
                    ),
                };
                add(path, outcome, reason.into());
                continue;
            }
            if tensors.bias.is_some() {
                let reason = "a bias of B is not supported; merge the adapter";
                add(
                    &tensor_key(path, Factor::Bias),
                    Outcome::Refused,
                    reason.into(),
                );
            }
            if tensors.a.rank() > 2 {
                let reason = "changes of convolutions are not supported; merge the adapter";
                add(path, Outcome::Refused, reason.into());
            }
            if tensors.embedding && server == Server::Vllm {
                let reason = "taken by models that list it among their embedding modules";
                add(path, Outcome::Depends, reason.into());
            }
            if tensors.magnitude.is_some() {
                let reason = "DoRA is not supported; merge the adapter";
                let part = tensor_key(path, Factor::Magnitude);
                add(&part, Outcome::Refused, reason.into());
            }
            let rank = matcher.rank_for(path, r)?;
            let scale = |alpha: f64, rank: usize| match rslora {
                true => alpha / (rank as f64).sqrt(),
                false => alpha / rank as f64,
            };
            let trained = scale(matcher.alpha_for(path, alpha)?, rank);
            let served = match server {
                Server::Vllm => scale(alpha, r),
                Server::LlamaCpp => scale(alpha, rank),
            };
            if (trained - served).abs() > 1e-6 * trained.abs() {
                let reason = format!("trained with the scale {trained}, served with {served}");
                add(path, Outcome::Wrong, reason);
            }
            if server == Server::Vllm && rank > VLLM_MAX_RANK {
                let reason = format!("rank {rank}: at most {VLLM_MAX_RANK} can be asked for");
                add(path, Outcome::Refused, reason);
            }
            if path.rsplit('.').next() == Some("lm_head") {
                let reason = match server {
                    Server::Vllm => "taken by models that list it among their embedding modules",
                    Server::LlamaCpp => "refused where the head is the embedding",
                };
                add(path, Outcome::Depends, reason.into());
            }
        }
        Ok(obstacles)
    }

    /// Adds what becomes of the base values that are stored beside the adapter.
    fn add_base_values(&self, server: Server, add: &mut impl FnMut(&str, Outcome, String)) {
        let around = self.modules();
        for base in &self.base_values {
            let around = around_of(&around, &base.path);
            let of_embedding = base.path.rsplit_once('.');
            let of_embedding = of_embedding.is_some_and(|(module, _)| is_embedding(module));
            let passes = match server {
                Server::Vllm => around == Around::Factors && of_embedding,
                Server::LlamaCpp => matches!(around, Around::Factors | Around::Rows),
            };
            let (outcome, reason) = match passes {
                true => (
                    Outcome::Depends,
                    "the base value is passed over: serve a base that has it, for instance with the same resized vocabulary",
                ),
                false => (
                    Outcome::Refused,
                    "a base value in the adapter's file: save the adapter without it, or merge the adapter",
                ),
            };
            add(&base_key(&base.path, around), outcome, reason.into());
        }
    }
}

/// Whether llama.cpp's converter takes this for a norm, which its server passes over.
fn is_norm_of_llama_cpp(path: &str) -> bool {
    path.contains("_layernorm") || path.contains(".norm")
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::format::{AdapterConfig, LoraTensors, ParameterTensor};
    use crate::model::TargetConfig;

    fn adapter(config: AdapterConfig, ranks: &[(&str, usize)]) -> AdapterFile {
        let tensors = ranks.iter().map(|&(path, rank)| {
            let ones = |shape: [usize; 2]| TensorData::ones::<f32, _>(shape);
            let mut tensors = LoraTensors::new(path, ones([rank, 4]), ones([6, rank]));
            tensors.magnitude = config.use_dora.then(|| TensorData::ones::<f32, _>([6]));
            tensors
        });
        let tensors = tensors.collect();
        AdapterFile::new(config, tensors)
    }

    fn found(file: &AdapterFile, server: Server) -> Vec<(String, Outcome)> {
        let obstacles = file.obstacles(server).unwrap().into_iter();
        obstacles
            .map(|obstacle| (obstacle.part, obstacle.outcome))
            .collect()
    }

    #[test]
    fn lora_on_linear_layers_is_served() {
        let config = AdapterConfig::new(4, 8.0, TargetConfig::list(["q"]));
        let file = adapter(config, &[("a.q", 4), ("b.q", 4)]);
        for server in [Server::Vllm, Server::LlamaCpp] {
            assert_eq!(found(&file, server), []);
        }
    }

    #[test]
    fn each_part_that_is_not_is_named() {
        use Outcome::{Depends, Refused, Wrong};
        let named = |parts: &[(&str, Outcome)]| -> Vec<_> {
            let parts = parts.iter();
            parts
                .map(|&(part, outcome)| (part.to_owned(), outcome))
                .collect()
        };
        let list = |names: &[&str]| TargetConfig::list(names.iter().copied());

        let dora = AdapterConfig::new(4, 8.0, list(&["q"])).with_use_dora(true);
        let dora = adapter(dora, &[("a.q", 4)]);
        let magnitude = "base_model.model.a.q.lora_magnitude_vector";
        for server in [Server::Vllm, Server::LlamaCpp] {
            assert_eq!(found(&dora, server), named(&[(magnitude, Refused)]));
        }

        let rslora = AdapterConfig::new(4, 8.0, list(&["q"])).with_use_rslora(true);
        let rslora = adapter(rslora, &[("a.q", 4)]);
        assert_eq!(found(&rslora, Server::Vllm), []);
        assert_eq!(
            found(&rslora, Server::LlamaCpp),
            named(&[("use_rslora", Wrong)])
        );

        // llama.cpp divides by the rank that a tensor has.
        let ranks = list(&["q"]).with_rank_pattern("b.q", 2);
        let ranks = adapter(AdapterConfig::new(4, 8.0, ranks), &[("a.q", 4), ("b.q", 2)]);
        assert_eq!(found(&ranks, Server::Vllm), named(&[("b.q", Wrong)]));
        assert_eq!(found(&ranks, Server::LlamaCpp), []);

        let alphas = list(&["q"]).with_alpha_pattern("b.q", 2.0);
        let alphas = adapter(
            AdapterConfig::new(4, 8.0, alphas),
            &[("a.q", 4), ("b.q", 4)],
        );
        for server in [Server::Vllm, Server::LlamaCpp] {
            assert_eq!(found(&alphas, server), named(&[("b.q", Wrong)]));
        }

        let head = adapter(
            AdapterConfig::new(600, 8.0, list(&["lm_head"])),
            &[("lm_head", 600)],
        );
        let expected = named(&[("lm_head", Refused), ("lm_head", Depends)]);
        assert_eq!(found(&head, Server::Vllm), expected);
        assert_eq!(
            found(&head, Server::LlamaCpp),
            named(&[("lm_head", Depends)])
        );
    }

    #[test]
    fn experts_norms_and_base_values_are_named() {
        use Outcome::{Depends, Refused, Wrong};
        let values = |path: &str| ParameterTensor {
            path: path.into(),
            data: TensorData::ones::<f32, _>([4]),
        };
        let config = AdapterConfig::new(4, 8.0, TargetConfig::list(["embed_tokens"]));
        let mut file = adapter(config, &[("mlp.experts", 4), ("model.embed_tokens", 4)]);
        file.config.target_parameters = vec!["mlp.experts.gate_up_proj".into()];
        file.tensors[0].experts = true;
        file.tensors[1].embedding = true;
        file.copies = vec![values("model.norm.weight"), values("score.weight")];
        file.base_values = vec![
            values("model.embed_tokens.weight"),
            values("lm_head.weight"),
        ];
        let based = "base_model.model.model.embed_tokens.base_layer.weight";
        let head = "base_model.model.lm_head.weight";
        let sorted = |server| {
            let mut found = found(&file, server);
            found.sort_by(|a, b| a.0.cmp(&b.0));
            found
        };
        let own = |parts: &[(&str, Outcome)]| -> Vec<_> {
            let parts = parts.iter();
            parts
                .map(|&(part, outcome)| (part.to_owned(), outcome))
                .collect()
        };
        let expected = own(&[
            (head, Refused),
            (based, Depends),
            ("mlp.experts", Wrong),
            ("model.embed_tokens", Depends),
            ("model.norm.weight", Refused),
            ("score.weight", Refused),
        ]);
        assert_eq!(sorted(Server::Vllm), expected);
        let expected = own(&[
            (head, Refused),
            (based, Depends),
            ("mlp.experts", Refused),
            ("model.norm.weight", Wrong),
            ("score.weight", Refused),
        ]);
        assert_eq!(sorted(Server::LlamaCpp), expected);
    }
}
