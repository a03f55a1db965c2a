#!/usr/bin/env bash
# Deep Forcing, ablation of its parts: rolling window, Deep Sink, with Participative Compression; 60 s.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen --only components "$@"
