//! What a run prints: scores, memory, answers.

use burn_peft::dataset::Instruction;
use burn_peft::model::ModelReport;

use crate::eval::Scores;

/// Head of the table that [`row`] fills.
pub fn table_head() -> String {
    "| model | held-out loss | exact match, % | ROUGE-L, % | loss on the base's own text |\n|---|---|---|---|---|".into()
}

/// One row; in brackets the 95 % confidence interval over the held-out triples.
pub fn row(name: &str, scores: &Scores) -> String {
    let text = scores
        .text_loss
        .map_or("-".into(), |loss| format!("{loss:.3}"));
    let (exact, rouge) = (scores.exact.times(100.0), scores.rouge.times(100.0));
    format!(
        "| {name} | {:.3} | {exact:.1} | {rouge:.1} | {text} |",
        scores.loss
    )
}

/// Memory of the parameters and of what training adds to them, by part. Activations are not in it.
pub fn memory(report: &ModelReport) -> String {
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    // f32 gradients and AdamW's two moments.
    let (gradients, moments) = (4 * report.trainable_params, 8 * report.trainable_params);
    let mut parts = vec![
        ("base, dense", report.dense_bytes),
        ("base, NF4", report.nf4_bytes),
        ("adapter", report.adapter_bytes),
        ("gradients", gradients),
        ("AdamW", moments),
    ];
    parts.retain(|(_, bytes)| *bytes > 0);
    let mut text = String::from("memory by part:");
    for (name, bytes) in parts {
        text += &format!(" {name} {:.3} MiB,", mib(bytes));
    }
    match peak_memory() {
        Some(bytes) => text + &format!(" peak of the process {:.0} MiB", mib(bytes)),
        None => text.trim_end_matches(',').into(),
    }
}

/// The most memory this process has had, where the system tells it as Linux does.
fn peak_memory() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

/// A few questions with the answers before and after.
pub fn answers(
    triples: &[Instruction],
    before: &[String],
    after: &[String],
    count: usize,
) -> String {
    let mut text = String::new();
    for ((triple, before), after) in triples.iter().zip(before).zip(after).take(count) {
        text += &format!(
            "\n  {} {}\n    right   {}\n    before  {}\n    after   {}\n",
            triple.instruction,
            one_line(&triple.input),
            one_line(&triple.response),
            one_line(before),
            one_line(after),
        );
    }
    text
}

/// The beginning of a text on one line.
fn one_line(text: &str) -> String {
    const WIDTH: usize = 90;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= WIDTH {
        return line;
    }
    line.chars().take(WIDTH).chain(['.', '.', '.']).collect()
}
