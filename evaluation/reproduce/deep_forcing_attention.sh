#!/usr/bin/env bash
# Attention over earlier frames, selections on the frames, their heat map and Jaccard distance; one prompt, 60 s.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen_attention --only self_forcing.60s deep_sink.60s deep_forcing.60s packforcing.60s record \
    --set prompts.count=1 "$@"
