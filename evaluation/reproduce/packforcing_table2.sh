#!/usr/bin/env bash
# PackForcing, Table 2 and its figure: CLIP score of every 10 s; 60 s, 128 prompts. Needs: python -m utils.download --only clip.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen --only packforcing_table2 --set "metrics=[basic, clip_score]" "$@"
