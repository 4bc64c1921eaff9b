//! Every argument of every example, with every kind of value that it must refuse by its name before the work begins.
//!
//! clap tells which arguments there are: one that the tables below do not know fails the test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, Parser};
use llama::arguments::{BASE, TRIPLES, parse_from};

#[allow(dead_code)]
#[path = "../../examples/align/args.rs"]
mod align;
#[allow(dead_code)]
#[path = "../../examples/bitsandbytes/args.rs"]
mod bitsandbytes;
#[allow(dead_code)]
#[path = "../../examples/chat_template/args.rs"]
mod chat_template;
#[allow(dead_code)]
#[path = "../../examples/finetune/args.rs"]
mod finetune;
#[allow(dead_code)]
#[path = "../../examples/generate/args.rs"]
mod generate;
#[allow(dead_code)]
#[path = "../../examples/interchange/args.rs"]
mod interchange;
#[allow(dead_code)]
#[path = "../../examples/large/args.rs"]
mod large;
#[allow(dead_code)]
#[path = "../../examples/load_base/args.rs"]
mod load_base;
#[allow(dead_code)]
#[path = "../../examples/logits/args.rs"]
mod logits;
#[allow(dead_code)]
#[path = "../../examples/memory_plan/args.rs"]
mod memory_plan;
#[allow(dead_code)]
#[path = "../../examples/pretrain/args.rs"]
mod pretrain;

/// What an argument takes.
#[derive(Clone, Copy)]
enum Kind {
    /// A whole number between two.
    Whole(u64, u64),
    /// A finite number above 0.
    Positive,
    /// At least 0, below 1.
    Probability,
    /// A text that is not blank.
    Text,
    /// Any text.
    Free,
    /// Names with commas.
    Names,
    /// One of a few words, such as this one.
    Choice(&'static str),
    /// Nothing.
    Flag,
    /// A directory that is there.
    InDirectory,
    /// A file that is there.
    InFile,
    /// A file or directory that is there.
    InEither,
    /// A directory to be written, and paths that it must not be.
    OutDirectory(&'static [&'static str]),
    /// A file to be written, with the end of its name, and paths that it must not be.
    OutFile(&'static str, &'static [&'static str]),
}

use Kind::*;

/// A row of a table: the argument's name, what it takes, and the arguments that it cannot go without.
type Row = (&'static str, Kind, &'static [&'static str]);

/// A program: how it is called without an argument too many, and its arguments.
struct Program {
    name: &'static str,
    /// The subcommand, if any.
    sub: Option<&'static str>,
    command: fn() -> Command,
    /// Parses and checks.
    check: fn(&[&str]) -> Result<(), String>,
    /// Arguments that are always needed.
    needed: &'static [(&'static str, &'static str)],
    rows: &'static [Row],
}

/// A stand-in for the scratch folder of the test in [`Program::needed`].
const NEW: &str = "NEW";

fn parsed<A: Parser>(
    arguments: &[&str],
    check: fn(&A) -> Result<(), String>,
) -> Result<(), String> {
    let arguments = parse_from::<A>(arguments).map_err(|error| error.to_string())?;
    check(&arguments)
}

const MOST: u64 = llama::arguments::MOST as u64;
const FINETUNE_SEED: u64 = u64::MAX - 1000;
const MODEL: Row = ("model", InDirectory, &[]);
const MODEL_ARGS: [Row; 3] = [
    ("adapter", InDirectory, &[]),
    ("quantize", Choice("nf4"), &[]),
    ("merge", Flag, &["--adapter", BASE]),
];

const PROGRAMS: &[Program] = &[
    Program {
        name: "finetune",
        sub: None,
        command: finetune::Args::command,
        check: |arguments| parsed(arguments, finetune::Args::check),
        needed: &[("--out", NEW)],
        rows: &[
            MODEL,
            ("data", InFile, &["--heldout", TRIPLES]),
            ("heldout", InFile, &[]),
            ("text", InFile, &[]),
            ("rank", Whole(1, 65_536), &[]),
            ("alpha", Positive, &[]),
            ("dropout", Probability, &[]),
            ("targets", Names, &[]),
            ("no_quantize", Flag, &[]),
            ("steps", Whole(1, MOST), &[]),
            ("batch", Whole(1, 65_536), &[]),
            ("seq_len", Whole(2, 1_048_576), &[]),
            ("lr", Positive, &[]),
            ("full_lr", Positive, &[]),
            ("seed", Whole(0, FINETUNE_SEED), &[]),
            ("prompt", Choice("chat"), &[]),
            ("system", Free, &[]),
            ("max_new_tokens", Whole(1, 1_048_576), &[]),
            ("eval", Whole(1, MOST), &[]),
            ("few_shot", Whole(1, 1024), &[]),
            ("shuffle_responses", Flag, &[]),
            ("compare", Flag, &[]),
            ("seeds", Whole(1, 1000), &[]),
            ("checkpoint", OutFile("", &[TRIPLES]), &[]),
            ("out", OutDirectory(&[BASE]), &[]),
        ],
    },
    Program {
        name: "align",
        sub: None,
        command: align::Args::command,
        check: |arguments| parsed(arguments, align::Args::check),
        needed: &[("--out", NEW)],
        rows: &[
            ("method", Choice("grpo"), &[]),
            MODEL,
            ("data", InFile, &["--heldout", TRIPLES]),
            ("heldout", InFile, &[]),
            ("text", InFile, &[]),
            ("sft_steps", Whole(1, MOST), &[]),
            ("steps", Whole(1, MOST), &[]),
            ("batch", Whole(1, 65_536), &[]),
            ("group", Whole(2, 1024), &[]),
            ("rank", Whole(1, 65_536), &[]),
            ("lr", Positive, &[]),
            ("beta", Positive, &[]),
            ("questions", Whole(1, MOST), &[]),
            ("seed", Whole(0, FINETUNE_SEED), &[]),
            ("seeds", Whole(1, 1000), &[]),
            ("out", OutDirectory(&[BASE]), &[]),
        ],
    },
    Program {
        name: "chat_template",
        sub: None,
        command: chat_template::Args::command,
        check: |arguments| parsed(arguments, |_: &chat_template::Args| Ok(())),
        needed: &[("--tokenizer", BASE), ("--conversations", TRIPLES)],
        rows: &[
            ("tokenizer", InDirectory, &[]),
            ("conversations", InFile, &[]),
            ("check", InFile, &[]),
        ],
    },
    Program {
        name: "generate",
        sub: None,
        command: generate::Args::command,
        check: |arguments| parsed(arguments, |_: &generate::Args| Ok(())),
        needed: &[("--model", BASE), ("", "a text")],
        rows: &[
            MODEL,
            MODEL_ARGS[0],
            MODEL_ARGS[1],
            MODEL_ARGS[2],
            ("tokens", Whole(1, 1_048_576), &[]),
            ("top_k", Whole(1, MOST), &[]),
            ("temperature", Positive, &["--top-k", "2"]),
            ("seed", Whole(0, u64::MAX), &["--top-k", "2"]),
            ("texts", Text, &[]),
        ],
    },
    Program {
        name: "logits",
        sub: None,
        command: logits::Args::command,
        check: |arguments| parsed(arguments, logits::Args::check),
        needed: &[("--model", BASE), ("--tokens", TRIPLES), ("--out", NEW)],
        rows: &[
            MODEL,
            MODEL_ARGS[0],
            MODEL_ARGS[1],
            MODEL_ARGS[2],
            ("tokens", InFile, &[]),
            ("out", OutFile("", &[TRIPLES]), &[]),
        ],
    },
    Program {
        name: "bitsandbytes",
        sub: Some("write"),
        command: bitsandbytes::Args::command,
        check: |arguments| parsed(arguments, bitsandbytes::Args::check),
        needed: &[("--model", BASE), ("--out", NEW)],
        rows: &[
            MODEL,
            ("out", OutDirectory(&[]), &[]),
            ("max_shard_bytes", Whole(1, u64::MAX), &[]),
        ],
    },
    Program {
        name: "bitsandbytes",
        sub: Some("read"),
        command: bitsandbytes::Args::command,
        check: |arguments| parsed(arguments, bitsandbytes::Args::check),
        needed: &[("--model", BASE), ("--tokens", TRIPLES), ("--out", NEW)],
        rows: &[
            MODEL,
            ("tokens", InFile, &[]),
            ("out", OutFile("", &[TRIPLES]), &[]),
        ],
    },
    Program {
        name: "load_base",
        sub: None,
        command: load_base::Args::command,
        check: |arguments| parsed(arguments, load_base::Args::check),
        needed: &[],
        rows: &[
            ("gib", Positive, &[]),
            (
                "d_in",
                Whole(1, 1_048_576),
                &["--d-out", "4096", "--gib", "0.01"],
            ),
            (
                "d_out",
                Whole(1, 1_048_576),
                &["--d-in", "4096", "--gib", "0.01"],
            ),
            ("repeat", Whole(1, 1000), &[]),
            ("dir", InDirectory, &[]),
        ],
    },
    Program {
        name: "pretrain",
        sub: None,
        command: pretrain::Args::command,
        check: |arguments| parsed(arguments, pretrain::Args::check),
        needed: &[("--out", NEW)],
        rows: &[
            ("steps", Whole(1, MOST), &[]),
            ("batch", Whole(1, 65_536), &[]),
            ("seq_len", Whole(2, 65_536), &[]),
            ("lr", Positive, &[]),
            ("seed", Whole(0, u64::MAX), &[]),
            ("out", OutDirectory(&[]), &[]),
        ],
    },
    Program {
        name: "interchange",
        sub: None,
        command: interchange::Args::command,
        check: |arguments| parsed(arguments, interchange::Args::check),
        needed: &[("--model", BASE), ("--kinds", BASE), ("--out", NEW)],
        rows: &[
            MODEL,
            ("kinds", InDirectory, &[]),
            ("out", OutDirectory(&[BASE]), &[]),
        ],
    },
    Program {
        name: "memory_plan",
        sub: None,
        command: memory_plan::Args::command,
        check: |arguments| parsed(arguments, memory_plan::Args::check),
        needed: &[],
        rows: &[
            ("shape", Choice("llama3-70b"), &[]),
            ("config", InEither, &[]),
            ("layers", Whole(1, 10_000), &[]),
            ("rank", Whole(1, 65_536), &[]),
            ("targets", Choice("mlp"), &[]),
            ("base", Choice("f32"), &[]),
            ("adapter", Choice("bf16"), &[]),
            ("embeddings", Choice("f32"), &[]),
            ("nf4_head", Flag, &[]),
            ("no_double_quant", Flag, &[]),
            ("optimizer", Choice("sgd"), &[]),
            ("batch", Whole(1, 65_536), &[]),
            ("seq", Whole(1, 16_777_216), &[]),
            ("segments", Whole(0, 10_000), &[]),
            ("chunked", Flag, &[]),
            ("out", OutFile(".png", &[]), &[]),
        ],
    },
    Program {
        name: "large",
        sub: None,
        command: large::Args::command,
        check: |arguments| parsed(arguments, |_: &large::Args| Ok(())),
        needed: &[("--shape", "llama3-8b")],
        rows: &[
            ("shape", Choice("llama3-70b"), &[]),
            MODEL,
            ("layers", Whole(1, 1024), &[]),
            ("rank", Whole(1, 4096), &[]),
            ("seq", Whole(2, 1_048_576), &[]),
            ("batch", Whole(1, 65_536), &[]),
            ("steps", Whole(2, 1_000_000), &[]),
            ("adapters", Choice("bf16"), &[]),
            ("optimizer", Choice("adamw-8bit"), &[]),
            ("seed", Whole(0, u64::MAX), &[]),
        ],
    },
];

/// Paths for the test.
struct Scratch {
    _guard: tempfile::TempDir,
    dir: PathBuf,
    file: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let guard = tempfile::tempdir().unwrap();
        let dir = guard.path().to_owned();
        let file = dir.join("file");
        std::fs::write(&file, "content").unwrap();
        Self {
            _guard: guard,
            dir,
            file,
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }
}

/// Values that an argument of this kind must take, and such that it must refuse.
fn values(kind: Kind, scratch: &Scratch) -> (Vec<String>, Vec<String>) {
    let (good, bad): (Vec<String>, Vec<String>) = match kind {
        Whole(least, most) => {
            let mut bad = [
                "-1",
                "nan",
                "inf",
                "1.5",
                "1e999",
                "x",
                "18446744073709551616",
            ]
            .map(String::from)
            .to_vec();
            bad.extend(least.checked_sub(1).map(|below| below.to_string()));
            bad.extend(most.checked_add(1).map(|above| above.to_string()));
            (vec![least.to_string(), most.to_string()], bad)
        }
        Positive => (
            strings(&["1e-3", "2"]),
            strings(&["0", "-0.0", "-1", "nan", "NaN", "inf", "-inf", "1e999", "x"]),
        ),
        Probability => (
            strings(&["0", "0.5"]),
            strings(&["1", "-0.1", "nan", "inf", "1.5", "x"]),
        ),
        Text => (strings(&["a"]), strings(&["", " \n"])),
        Free => (strings(&["", "a"]), Vec::new()),
        Names => (
            strings(&["q_proj", "q_proj, v_proj", "all-linear"]),
            strings(&[" ", ",", "q_proj,", "q_proj,,v_proj"]),
        ),
        Choice(word) => (strings(&[word]), strings(&["nonsense", "0"])),
        Flag => (Vec::new(), Vec::new()),
        InDirectory => (
            vec![scratch.path("")],
            vec![scratch.path("none"), scratch.path("file")],
        ),
        InFile => (
            vec![scratch.path("file")],
            vec![scratch.path("none"), scratch.path("")],
        ),
        InEither => (
            vec![scratch.path("file"), scratch.path("")],
            vec![scratch.path("none"), scratch.path("file/below")],
        ),
        OutDirectory(inputs) => (
            vec![scratch.path("new/out"), scratch.path("")],
            [scratch.path("file"), scratch.path("file/below/out")]
                .into_iter()
                .chain(strings(inputs))
                .collect(),
        ),
        OutFile(end, inputs) => (
            vec![scratch.path(&format!("new/out{end}"))],
            [scratch.path(""), scratch.path(&format!("file/below{end}"))]
                .into_iter()
                .chain(strings(inputs))
                .collect(),
        ),
    };
    let empty = !matches!(kind, Free | Flag);
    let bad = bad.into_iter().chain(empty.then(String::new)).collect();
    (good, bad)
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

impl Program {
    /// The arguments of clap's command, or of its subcommand.
    fn known(&self) -> BTreeSet<String> {
        let mut command = (self.command)();
        command.build();
        let command = match self.sub {
            None => &command,
            Some(sub) => command.find_subcommand(sub).unwrap(),
        };
        let ids = command.get_arguments().map(|arg| arg.get_id().to_string());
        ids.filter(|id| id != "help" && id != "version").collect()
    }

    /// A call with all that is needed, `row`'s companions, and `given` in place of what is needed of that name.
    fn call(&self, row: &Row, given: &[String], scratch: &Scratch) -> Result<(), String> {
        let (id, _, with) = row;
        let mut arguments = strings(&[self.name]);
        arguments.extend(self.sub.map(String::from));
        let own = match *id {
            "texts" => String::new(),
            id => flag(id),
        };
        for (name, value) in self.needed {
            // A group of arguments that exclude one another.
            let excluded = self.name == "large" && *id == "model" && *name == "--shape";
            if *name == own || excluded || with.contains(name) {
                continue;
            }
            let value = match *value {
                NEW => scratch.path("new/fresh"),
                value => value.to_owned(),
            };
            arguments.extend((!name.is_empty()).then(|| (*name).to_owned()));
            arguments.push(value);
        }
        arguments.extend(strings(with));
        arguments.extend(given.iter().cloned());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        (self.check)(&arguments)
    }
}

fn flag(id: &str) -> String {
    format!("--{}", id.replace('_', "-"))
}

#[test]
fn every_argument_of_every_example_is_in_the_tables() {
    for program in PROGRAMS {
        let listed: BTreeSet<String> = program
            .rows
            .iter()
            .map(|(id, ..)| (*id).to_owned())
            .collect();
        assert_eq!(program.known(), listed, "{}", program.name);
    }
    // Every example of the package has its arguments here, or takes none.
    let manifest =
        std::fs::read_to_string(crate::repository().join("examples/Cargo.toml")).unwrap();
    let (_, examples) = manifest.split_once("[[example]]").unwrap();
    let names = examples
        .lines()
        .filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    let tested: BTreeSet<&str> = PROGRAMS.iter().map(|program| program.name).collect();
    for name in names.filter(|name| *name != "make_data") {
        assert!(
            tested.contains(name),
            "the arguments of {name} are not tested"
        );
    }
}

#[test]
fn a_value_that_cannot_be_is_refused_by_the_arguments_name() {
    let scratch = Scratch::new();
    for program in PROGRAMS {
        for row in program.rows {
            let (id, kind, _) = row;
            let (_, bad) = values(*kind, &scratch);
            for value in bad {
                let (name, calls) = match *id {
                    "texts" => ("<TEXTS>".to_owned(), vec![vec![value.clone()]]),
                    id => {
                        let name = flag(id);
                        let joined = vec![format!("{name}={value}")];
                        let apart = vec![name.clone(), value.clone()];
                        // clap takes `-inf` for short arguments.
                        let apart = (!value.starts_with("-inf")).then_some(apart);
                        (name, [joined].into_iter().chain(apart).collect())
                    }
                };
                for call in calls {
                    let outcome = program.call(row, &call, &scratch);
                    let error = outcome.expect_err(&format!("{}: {call:?} is taken", program.name));
                    assert!(error.contains(&name), "{}: {call:?}: {error}", program.name);
                }
            }
            if let Flag = kind {
                let given = [format!("{}=x", flag(id))];
                assert!(program.call(row, &given, &scratch).is_err(), "{id}");
            }
        }
    }
    assert_untouched(&scratch);
}

#[test]
fn values_in_range_are_taken() {
    let scratch = Scratch::new();
    for program in PROGRAMS {
        for row in program.rows {
            let (id, kind, _) = row;
            let (good, _) = values(*kind, &scratch);
            let mut calls: Vec<Vec<String>> = Vec::new();
            match (*id, kind) {
                ("texts", _) => calls.extend(good.into_iter().map(|value| vec![value])),
                (id, Flag) => calls.push(vec![flag(id)]),
                (id, _) => calls.extend(good.into_iter().map(|value| vec![flag(id), value])),
            }
            for call in calls {
                if let Err(error) = program.call(row, &call, &scratch) {
                    panic!("{}: {call:?}: {error}", program.name);
                }
            }
        }
    }
    assert_untouched(&scratch);
}

/// Checking arguments has written nothing.
fn assert_untouched(scratch: &Scratch) {
    let entries = std::fs::read_dir(&scratch.dir).unwrap();
    let names: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(names, std::slice::from_ref(&scratch.file));
    assert_eq!(std::fs::read_to_string(&scratch.file).unwrap(), "content");
    assert!(Path::new(BASE).join("config.json").is_file());
}
