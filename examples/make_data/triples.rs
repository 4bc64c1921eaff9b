//! Instruction triples about a fact: what fine-tuning teaches the base model to follow.

use super::facts::{Fact, Relation};
use super::sentences::SUBJECTS;

/// One kind of instruction about a fact.
pub struct Question {
    /// Ways to word the instruction.
    pub instructions: [&'static str; 3],
    /// The input.
    pub input: String,
    /// The one right answer.
    pub response: String,
}

/// Every kind of instruction that asks for `fact`. `subject` (0 to 4) chooses who acts in a sentence.
pub fn questions(fact: &Fact, subject: usize) -> Vec<Question> {
    let (s, o, c) = (&fact.subject, &fact.object, &fact.complement);
    let word = |instructions, input: &str, response: &str| Question {
        instructions,
        input: input.into(),
        response: response.into(),
    };
    match fact.relation {
        Relation::Past => {
            let who = SUBJECTS[subject];
            vec![
                word(
                    [
                        "Give the past tense of the verb.",
                        "Put this verb in the past.",
                        "What is the past form of this verb?",
                    ],
                    s,
                    o,
                ),
                word(
                    [
                        "Rewrite the sentence in the past tense.",
                        "Change the sentence so that it tells of the past.",
                        "Put the whole sentence in the past.",
                    ],
                    &format!("{who} {s} {c}."),
                    &format!("{who} {o} {c}."),
                ),
            ]
        }
        Relation::Plural => vec![word(
            [
                "Give the plural of the noun.",
                "What do you call two or more of these?",
                "Write this noun in the plural.",
            ],
            s,
            o,
        )],
        Relation::Opposite => vec![word(
            [
                "Give the opposite of the word.",
                "What is the contrary of this word?",
                "Name the word with the reverse meaning.",
            ],
            s,
            o,
        )],
        Relation::Kind => vec![word(
            [
                "What kind of thing is this?",
                "Name the group this belongs to.",
                "Classify the word.",
            ],
            s,
            o,
        )],
        Relation::Capital => vec![
            word(
                [
                    "Name the capital of the country.",
                    "What is the capital city here?",
                    "From which city is this country ruled?",
                ],
                s,
                o,
            ),
            word(
                [
                    "Which country has this capital?",
                    "Name the country of this capital city.",
                    "In which country is this city?",
                ],
                o,
                s,
            ),
        ],
        Relation::Continent => vec![word(
            [
                "On which continent is the country?",
                "Name the continent.",
                "Where on the map is this country?",
            ],
            s,
            o,
        )],
        Relation::Job => vec![word(
            [
                "Name the person who does this.",
                "Which job is described?",
                "What do you call someone like that?",
            ],
            s,
            o,
        )],
        Relation::Young => vec![word(
            [
                "What is the young of this animal called?",
                "Name the baby of this animal.",
                "Give the word for the young animal.",
            ],
            s,
            o,
        )],
        Relation::Sum => vec![word(
            [
                "Add the two numbers.",
                "What is the sum?",
                "How much is this together?",
            ],
            s,
            o,
        )],
    }
}
