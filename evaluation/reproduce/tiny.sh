#!/usr/bin/env bash
# The papers' comparisons and ablations on the embedded model: sink depth, parts, votes, methods, all figures, the page.
#
#   bash evaluation/reproduce/tiny.sh           4 captions, 30 s: two CPU cores -> outputs/tiny
#   bash evaluation/reproduce/tiny.sh --full    64 captions, 60 s: one GPU, ten minutes a command -> outputs/tiny_full
#
# --full stops after LIMIT_S (default 570 s) with exit status 124; run it again until it says 0. Other arguments are
# those of `python -m evaluation sweep`.
size=reduced
if [ "${1:-}" = --full ]; then
    size=full
    shift
    LIMIT_S="${LIMIT_S:-570}"
fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ "$size" = reduced ]; then
    reproduce tiny tiny --device cpu "$@"
else
    WORKERS="${WORKERS:-$((PROCESSORS < 16 ? PROCESSORS : 16))}"  # one GPU for all: making is short, measuring is on the CPU
    reproduce tiny tiny_full --device cuda:0 --set seconds=[60] "prompts.captions=[{split: test, count: 64}]" \
        batch_size=64 record.seconds=60 "$@"
fi
