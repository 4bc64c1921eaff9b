//! A bar for the loading of a base model: tensors, bytes, rate.

use burn_peft::format::LoadProgress;
use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far loading is on the terminal, if there is one.
pub fn bar() -> impl Fn(&LoadProgress) + Send + Sync + 'static {
    let style = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {msg}";
    let style = ProgressStyle::with_template(style).expect("a fixed template");
    let bar = ProgressBar::new(0).with_style(style);
    move |progress| {
        let LoadProgress {
            tensors,
            total_tensors,
            bytes,
            total_bytes,
            ..
        } = *progress;
        bar.set_length(total_bytes);
        bar.set_position(bytes);
        bar.set_message(format!("{tensors}/{total_tensors} tensors"));
        if tensors == total_tensors {
            bar.finish_and_clear();
        }
    }
}
