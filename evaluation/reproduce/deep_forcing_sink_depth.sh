#!/usr/bin/env bash
# Deep Forcing, figure of the sink depth: drift and consistency over the sink's frames; 60 s.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce moviegen moviegen --only sink_depth "$@"
