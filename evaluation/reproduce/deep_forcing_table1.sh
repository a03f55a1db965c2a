#!/usr/bin/env bash
# Deep Forcing, Table 1: 60 s, 128 prompts. VBench's columns: see evaluation/sweeps/moviegen.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen --only deep_forcing_table1 "$@"
