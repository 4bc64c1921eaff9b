#!/bin/sh
# Fine-tunes SmolLM2-135M-Instruct to write the synopses of Debian's packages, against two controls:
#
#     examples/smollm2_debian.sh MODEL DATA OUT [OPTIONS OF EVERY RUN...]
#
# MODEL is made by examples/smollm2.py, DATA by examples/debian_synopses.py (train.jsonl, heldout.jsonl). OUT gets table.md, a log of
# each run, the adapter and its loss curve. An earlier run in OUT is kept where its log is complete.
set -eu
[ $# -ge 3 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 data=$2 out=$3
shift 3
mkdir -p "$out"

# What every row has in common. The system message is the one that the model was trained with.
finetune() {
    name=$1
    shift
    if [ ! -f "$out/$name.log" ]; then
        cargo run --release --example finetune -- \
            --model "$model" --data "$data/train.jsonl" --heldout "$data/heldout.jsonl" --out "$out/$name" \
            --system "You are a helpful AI assistant named SmolLM, trained by Hugging Face" \
            --rank 16 --alpha 32 --lr 5e-4 --steps 60 --batch 8 --seq-len 256 --max-new-tokens 32 "$@" \
            > "$out/$name.log.part"
        mv "$out/$name.log.part" "$out/$name.log"
    fi
}

finetune few-shot --few-shot 3 "$@"             # control: the base shown three examples
finetune shuffled --shuffle-responses "$@"      # control: an adapter that can learn the form only
finetune adapter "$@"                           # its table also has the base without examples

{
    grep '^| ' "$out/adapter.log" | head -n 1
    grep '^|--' "$out/adapter.log"
    grep '^| base |' "$out/adapter.log"
    grep '^| base, 3' "$out/few-shot.log"
    grep '^| adapter' "$out/shuffled.log"
    grep '^| adapter' "$out/adapter.log"
    echo
    grep '^in brackets' "$out/adapter.log"
} > "$out/table.md"
cp "$out/adapter/loss.png" "$out/loss.png"
cat "$out/table.md"
