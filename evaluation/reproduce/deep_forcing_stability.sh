#!/usr/bin/env bash
# Deep Forcing, visual stability: 30 s, 128 prompts. Needs a vision-language model of yours: --vlm MODULE:FUNCTION.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen --only deep_forcing_stability --set "metrics=[basic, visual_stability]" "$@"
