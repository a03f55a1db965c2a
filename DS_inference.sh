#!/usr/bin/env bash
# Deep Sink: a minute of video for each prompt. Sets itself up; arguments are added to the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/utils/environment.sh"
environment requirements.txt
length=(--seconds 60)
for argument in "$@"; do
    case "$argument" in --num_output_frames*) length=() ;; esac
done
exec "$PYTHON" inference.py --config_path configs/deep_sink.yaml ${length[@]+"${length[@]}"} --use_ema --output_folder videos/deep_sink "$@"
