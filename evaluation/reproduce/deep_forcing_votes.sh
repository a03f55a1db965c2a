#!/usr/bin/env bash
# Deep Forcing, ablation of the selection: random, past, denoising and both queries; 60 s.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen --only votes "$@"
