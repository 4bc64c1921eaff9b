#!/usr/bin/env python3
"""Makes instruction triples from Debian's package index: from a package's long description to its one-line synopsis.

    apt-get -o Acquire::Languages=en -o Dir::State::Lists=LISTS update      # LISTS: an empty folder with a folder `partial` in it
    examples/debian_synopses.py --lists LISTS --out DIR

writes DIR/train.jsonl and DIR/heldout.jsonl, the same for the same index. Needs Python 3.9 and apt, nothing else.

Packages built from one source describe the same thing, and so do the bindings of one library for several languages. So one
package is taken of each source, one source of each name without version and language, and no description twice: what is held
out has no twin in training. A synopsis that stands in its description is left out, for it could be copied.
"""

import argparse
import hashlib
import json
import re
import subprocess
from pathlib import Path

INSTRUCTION = "Write the one-line synopsis of this Debian package."
LANGUAGES = "node|ruby|python3?|golang|rust|haskell|ghc|php|lua|ocaml|perl|java|go|r|cran|bioc|cl|elpa|github|com|org|lib"


def stanzas(lists: Path, pattern: str):
    """Every stanza of the index files, as a dictionary."""
    for file in sorted(lists.glob(pattern)):
        # The files may be compressed; apt knows how.
        text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", file], check=True, capture_output=True, text=True).stdout
        for stanza in text.split("\n\n"):
            yield dict(re.findall(r"^([\w-]+): (.*(?:\n[ \t].*)*)", stanza, re.M))


def paragraphs(description: str, limit: int) -> str:
    """The long description with one line a paragraph, cut at a word after at most `limit` characters."""
    lines = [line[1:].rstrip() for line in description.split("\n")]
    text = "\n".join(" ".join(block.split()) for block in re.split(r"\n\.\n|\n\.$", "\n".join(lines)))
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def stem(source: str) -> str:
    """A source's name without versions and languages: what bindings of one library share."""
    words = [word for word in re.split(r"[-_.+]", source.lower()) if not re.fullmatch(rf"({LANGUAGES})|v?\d*", word)]
    return re.sub(r"\d+$", "", "-".join(words)) or source


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, default=Path("/var/lib/apt/lists"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--heldout", type=int, default=200)
    parser.add_argument("--limit", type=int, default=500, help="characters of a description")
    args = parser.parse_args()

    sources = {}
    for package in stanzas(args.lists, "*_main_binary-*_Packages*"):
        if "Package" in package:
            sources[package["Package"]] = package.get("Source", package["Package"]).split()[0]

    taken = {}
    descriptions, synopses = set(), set()
    for package in stanzas(args.lists, "*_main_i18n_Translation-en*"):
        name, text = package.get("Package"), package.get("Description-en", "")
        if name not in sources or "\n" not in text:
            continue
        synopsis, description = text.split("\n", 1)
        synopsis, description = synopsis.strip(), paragraphs(description, args.limit)
        key = stem(sources[name])
        if (
            key in taken
            or not 15 <= len(synopsis) <= 80
            or len(description) < 150
            or not (synopsis + description).isascii()
            or re.search(r"-(dev|doc|dbg|data|common|l10n|perl|bin)$|^(task-|fonts-|hunspell-|education-)", name)
            or re.search(r"transitional|dummy|metapackage|meta package|debug symbols|\(.*\)$|^transition", synopsis, re.I)
            or synopsis.lower().rstrip(".") in description.lower()
            or synopsis.lower() in synopses
            or description[:100] in descriptions
        ):
            continue
        synopses.add(synopsis.lower())
        descriptions.add(description[:100])
        taken[key] = {"instruction": INSTRUCTION, "input": description, "response": synopsis}

    # An order that depends on nothing but the names.
    keys = sorted(taken, key=lambda key: hashlib.sha256(key.encode()).digest())
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"heldout": keys[: args.heldout], "train": keys[args.heldout : args.heldout + args.train]}
    for part, chosen in parts.items():
        lines = [json.dumps(taken[key], ensure_ascii=False) for key in chosen]
        (args.out / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{part}.jsonl: {len(lines)} of {len(keys)} triples")


if __name__ == "__main__":
    main()
