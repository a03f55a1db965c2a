#!/usr/bin/env bash
# PackForcing, Table 1: 60 and 120 s, 128 prompts. VBench's columns: see evaluation/sweeps/moviegen.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen --only packforcing_table1_60s packforcing_table1_120s "$@"
