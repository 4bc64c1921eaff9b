//! The same tests of four models: loaded, adapted, packed, trained, saved, merged.

mod adapters;
mod bases;
mod golden;
mod network;
mod training;

/// Every test for one model.
macro_rules! tests_of {
    ($name:ident, $model:ty) => {
        mod $name {
            use super::{adapters, bases, training};

            type Model = $model;

            #[test]
            fn a_checkpoint_is_loaded() {
                bases::is_loaded::<Model>();
            }

            #[test]
            fn packed_weights_compute_what_bitsandbytes_restores() {
                bases::is_packed::<Model>();
            }

            #[test]
            fn an_adapter_of_pefts_is_loaded() {
                adapters::is_loaded::<Model>();
            }

            #[test]
            fn an_adapter_of_pefts_is_loaded_over_packed_weights() {
                adapters::is_loaded_over_nf4::<Model>();
            }

            #[test]
            fn an_adapter_of_pefts_is_saved_as_it_was() {
                adapters::is_saved_as_it_was::<Model>();
            }

            #[test]
            fn an_adapter_is_merged() {
                adapters::is_merged::<Model>();
            }

            #[test]
            fn a_plain_loop_trains_an_adapter() {
                training::by_a_plain_loop::<Model>();
            }

            #[test]
            fn a_plain_loop_trains_an_adapter_over_packed_weights() {
                training::by_a_plain_loop_over_nf4::<Model>();
            }

            #[test]
            fn burns_learner_trains_an_adapter() {
                training::by_the_learner::<Model>();
            }
        }
    };
}

tests_of!(qwen3, bunsen::kits::gpts::qwen3::Qwen3Model);
tests_of!(whisper, bunsen::kits::speech::whisper::Whisper);
tests_of!(resnet, bunsen::kits::images::resnet::ResNet);
tests_of!(swin, bunsen::kits::images::swin::v2::SwinTransformerV2);
