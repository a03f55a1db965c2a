#!/usr/bin/env bash
# Deep Sink: a minute of video for each prompt. Sets itself up; arguments are added to the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/utils/environment.sh"
environment requirements.txt
minute_of_video deep_sink "$@"
