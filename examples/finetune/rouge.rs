//! ROUGE-L: the harmonic mean of precision and recall of the longest common subsequence of two texts.
//!
//! `F = 2PR / (P + R)`, `P = LCS(x, y) / |y|`, `R = LCS(x, y) / |x|`, for a reference of `|x|` words and a prediction of `|y|`.
//!
//! Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004); words are those of Python's `rouge_score`
//! without stemming: lower case, split at whatever is neither `a` to `z` nor a digit.

/// ROUGE-L of a prediction, from 0 to 1; 0 if either text has no word.
pub fn rouge_l(reference: &str, prediction: &str) -> f64 {
    let (x, y) = (words(reference), words(prediction));
    let common = lcs(&x, &y) as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / y.len() as f64, common / x.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Length of the longest common subsequence.
fn lcs(x: &[String], y: &[String]) -> usize {
    // row[j] is the length for the words of x seen so far and the first j of y.
    let mut row = vec![0; y.len() + 1];
    for word in x {
        let mut diagonal = 0;
        for (j, other) in y.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other {
                diagonal + 1
            } else {
                above.max(row[j])
            };
            diagonal = above;
        }
    }
    row[y.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_pythons_rouge_score() {
        // rouge_score 0.1.2: RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
        for (reference, prediction, expected) in [
            (
                "the cat sat on the mat",
                "the cat is on the mat",
                0.8333333333333334,
            ),
            (
                "Simple image viewer for GTK+",
                "A simple, fast GTK+ image-viewer",
                0.5454545454545454,
            ),
            ("a b c d e f", "f e d c b a", 0.16666666666666666),
            (
                "library for parsing XML (development files)",
                "development files for the XML library",
                0.3333333333333333,
            ),
            ("", "anything", 0.0),
            ("--- ***", "a", 0.0),
            ("one two three", "one two three", 1.0),
            (
                "Größe in 3 Teilen",
                "grösse in 3 teilen",
                0.8000000000000002,
            ),
            ("a a b b", "a b a b b a", 0.8),
        ] {
            // Python computes in f64 too, in another order: a few roundings.
            assert!(
                (rouge_l(reference, prediction) - expected).abs() < 1e-14,
                "{reference:?} {prediction:?}"
            );
        }
    }
}
