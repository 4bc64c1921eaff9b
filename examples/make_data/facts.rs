//! The world's facts, `relation<TAB>subject<TAB>object[<TAB>complement]` by line of `examples/data/facts.tsv`, and sums.

/// One fact of the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What the fact is about.
    pub relation: Relation,
    /// What the fact is asked from: a verb, a country, ...
    pub subject: String,
    /// What it leads to: its past tense, its capital, ...
    pub object: String,
    /// The words that complete a sentence with a verb, else empty.
    pub complement: String,
    /// Facts of one group are on the same side of the split: `hot`/`cold` and `cold`/`hot`, a country and its capital.
    pub group: String,
}

/// The relations of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    Past,
    Plural,
    Opposite,
    Kind,
    Capital,
    Continent,
    Job,
    Young,
    Sum,
}

const NUMBERS: [&str; 31] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
    "twenty-one",
    "twenty-two",
    "twenty-three",
    "twenty-four",
    "twenty-five",
    "twenty-six",
    "twenty-seven",
    "twenty-eight",
    "twenty-nine",
    "thirty",
];

/// All facts in a fixed order: those of the file, opposites in both directions, and the sums of 1 to 15.
///
/// # Panics
/// On a malformed line: the file is part of the repository.
pub fn facts(tsv: &str) -> Vec<Fact> {
    let mut facts = Vec::new();
    for line in tsv.lines() {
        let columns: Vec<&str> = line.split('\t').collect();
        let [name, subject, object, ref rest @ ..] = columns[..] else {
            panic!("facts.tsv: {line:?} has fewer than three columns");
        };
        let relation = relation(name);
        let fact = Fact {
            relation,
            subject: subject.into(),
            object: object.into(),
            complement: rest.concat(),
            // A country's capital and continent are different facts, but a capital is also asked backwards.
            group: format!("{name} {subject}"),
        };
        if relation == Relation::Opposite {
            facts.push(Fact {
                subject: fact.object.clone(),
                object: fact.subject.clone(),
                ..fact.clone()
            });
        }
        facts.push(fact);
    }
    for a in 1..=15 {
        for b in 1..=15 {
            facts.push(Fact {
                relation: Relation::Sum,
                subject: format!("{} and {}", NUMBERS[a], NUMBERS[b]),
                object: NUMBERS[a + b].into(),
                complement: String::new(),
                group: format!("sum {} {}", a.min(b), a.max(b)),
            });
        }
    }
    facts
}

fn relation(name: &str) -> Relation {
    match name {
        "past" => Relation::Past,
        "plural" => Relation::Plural,
        "opposite" => Relation::Opposite,
        "kind" => Relation::Kind,
        "capital" => Relation::Capital,
        "continent" => Relation::Continent,
        "job" => Relation::Job,
        "young" => Relation::Young,
        _ => panic!("facts.tsv: unknown relation {name:?}"),
    }
}
