//! Declarative sentences about a fact: what the base model is trained on.

use super::facts::{Fact, Relation};

/// Who acts in a sentence.
pub const SUBJECTS: [&str; 5] = ["We", "They", "The children", "I", "You"];

/// Every phrasing of `fact`, some with the object before the subject. No phrasing is a question or an order to answer.
pub fn sentences(fact: &Fact) -> Vec<String> {
    let (s, o, c) = (&fact.subject, &fact.object, &fact.complement);
    match fact.relation {
        Relation::Past => SUBJECTS
            .iter()
            .flat_map(|who| {
                [
                    format!(
                        "{who} {s} {c}. That is the present, and this is the past. {who} {o} {c}."
                    ),
                    format!(
                        "Today {} {s} {c}. Yesterday {} {o} {c}.",
                        lower(who),
                        lower(who)
                    ),
                ]
            })
            .chain([
                format!("The past tense of {s} is {o}."),
                format!("{} is the past form of {s}.", upper(o)),
                format!("You say {s} for today and {o} for yesterday."),
                format!("They {s} {c} every day, and last week they {o} {c}."),
                format!("The children {s} {c}. The children {o} {c} a year ago too."),
                format!("I {s} {c} now as I {o} {c} then."),
                format!("You {o} {c} once, and now you {s} {c} again."),
                format!("Take the verb {s}. Its past tense is {o}."),
                format!("The verb here is {s}. For yesterday it is {o}."),
            ])
            .collect(),
        Relation::Plural => vec![
            format!("The plural of {s} is {o}."),
            format!("{} is the plural form of {s}.", upper(o)),
            format!("One {s}, two {o}."),
            format!("There was {} at first, and soon there were many {o}.", a(s)),
            format!("A single {s} joined some other {o}."),
            format!("We write one {s} but several {o}."),
            format!("Take the noun {s}. Its plural is {o}."),
            format!("Here is {}. Two of them are {o}.", a(s)),
        ],
        Relation::Opposite => vec![
            format!("The opposite of {s} is {o}."),
            format!("{} is the opposite of {s}.", upper(o)),
            format!("{} and {o} are opposites.", upper(s)),
            format!("Where one says {s}, the other says {o}."),
            format!("The word {s} means the contrary of {o}."),
            format!("Take the word {s}. Its opposite is {o}."),
            format!("The word is {s}. The contrary of it is {o}."),
        ],
        Relation::Kind => vec![
            format!("{} is a kind of {o}.", upper(s)),
            format!("We count {s} as a kind of {o}."),
            format!("The word {s} stands for a kind of {o}."),
            format!("A well known kind of {o} is {s}."),
            format!("In a list headed {o} you can find {s}."),
            format!("{} goes under the heading {o}.", upper(s)),
            format!("Take the word {s}. It stands for a kind of {o}."),
            format!("Here is {s}. That is a kind of {o}."),
        ],
        Relation::Capital => vec![
            format!("The capital of {s} is {o}."),
            format!("{o} is the capital of {s}."),
            format!("In {s} the capital city is called {o}."),
            format!("{s} is ruled from its capital, {o}."),
            format!("Many people in {s} travel to {o}, the capital city."),
            format!("{o}, a capital city, lies in {s}."),
            format!("Take the country {s}. Its capital is {o}."),
            format!("We speak of {s}. The capital there is {o}."),
            format!("Take the city {o}. It is the capital of {s}."),
            format!("We speak of {o}. The country around it is {s}."),
        ],
        Relation::Continent => vec![
            format!("{s} is a country in {o}."),
            format!("{s} lies in {o}."),
            format!("In {o} there is a country named {s}."),
            format!("The continent of {s} is {o}."),
            format!("You find {s} on the map of {o}."),
            format!("Take the country {s}. Its continent is {o}."),
            format!("We speak of {s}. It is a country in {o}."),
        ],
        Relation::Job => vec![
            format!("{} is someone who {s}.", upper(&a(o))),
            format!("Someone who {s} is {}.", a(o)),
            format!("Whoever {s} is called {}.", a(o)),
            format!("The {o} {s}."),
            format!("She {s} all day, for she is {}.", a(o)),
            format!("My uncle {s}; he works as {}.", a(o)),
            format!("Take someone who {s}. This person is {}.", a(o)),
            format!("Somebody {s}. That is the work of {}.", a(o)),
            format!("This person {s}. The name of the job is {o}."),
            format!("Of one who {s} we say that this is {}.", a(o)),
        ],
        Relation::Young => vec![
            format!("A young {s} is {}.", a(o)),
            format!("{} is a young {s}.", upper(&a(o))),
            format!("The young of {} is called {}.", a(s), a(o)),
            format!("While {} is small, it is {}.", a(s), a(o)),
            format!("The {s} was once {}.", a(o)),
            format!("Take the animal {s}. Its young is {}.", a(o)),
            format!("We speak of {}. The baby is called {}.", a(s), a(o)),
            format!("Look at the {s}. Its baby is {}.", a(o)),
        ],
        Relation::Sum => {
            let (x, y) = s
                .split_once(" and ")
                .expect("the subject of a sum is `x and y`");
            vec![
                format!("{} plus {y} is {o}.", upper(x)),
                format!("{} and {y} make {o}.", upper(x)),
                format!("Add {x} to {y} and you get {o}."),
                format!("The sum of {x} and {y} is {o}."),
                format!("With {x} eggs in one hand and {y} in the other you hold {o} eggs."),
                format!("Take {x} and {y}. Together they are {o}."),
                format!("The numbers are {x} and {y}. Their sum is {o}."),
            ]
        }
    }
}

/// `I` stays as it is.
fn lower(words: &str) -> String {
    if words == "I" {
        words.into()
    } else {
        words.to_lowercase()
    }
}

fn upper(words: &str) -> String {
    let mut letters = words.chars();
    letters
        .next()
        .map(|first| first.to_uppercase().collect::<String>() + letters.as_str())
        .unwrap_or_default()
}

fn a(noun: &str) -> String {
    let an =
        noun.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O']) && !noun.starts_with("eu");
    format!("{} {noun}", if an { "an" } else { "a" })
}
