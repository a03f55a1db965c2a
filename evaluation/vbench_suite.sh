#!/usr/bin/env bash
# Rates one folder that `python -m evaluation export-vbench` wrote with the official VBench suite, in an environment
# that it makes for itself (VBench pins NumPy 1 and transformers 4.33). Needs a GPU, git, Python 3.10 and a connection.
#
#   bash evaluation/vbench_suite.sh FOLDER [long|whole]     2 s clips as Deep Forcing, whole videos as PackForcing
#
#   VBENCH=folder   where the suite and its environment live (default: ~/.cache/deep-forcing/vbench)
set -euo pipefail

COMMIT=98b19513678e99c80d8377fda25ba53b81a491a6
DIMENSIONS=(subject_consistency background_consistency motion_smoothness dynamic_degree overall_consistency
            imaging_quality aesthetic_quality)
folder="$(cd "${1:?give a folder that export-vbench wrote}" && pwd)"
granularity="${2:-long}"
[ -f "$folder/vbench_export.json" ] || { echo "error: $folder was not written by export-vbench" >&2; exit 2; }
case "$granularity" in long|whole) ;; *) echo "error: $granularity is neither long nor whole" >&2; exit 2 ;; esac

suite="${VBENCH:-${XDG_CACHE_HOME:-$HOME/.cache}/deep-forcing/vbench}"
if [ ! -f "$suite/ready-$COMMIT" ]; then
    command -v python3.10 > /dev/null || { echo "error: VBench's pins need python3.10; install it" >&2; exit 2; }
    mkdir -p "$suite"
    [ -d "$suite/source" ] || git clone --no-checkout https://github.com/Vchitect/VBench.git "$suite/source"
    git -C "$suite/source" fetch --quiet origin "$COMMIT"
    git -C "$suite/source" checkout --quiet "$COMMIT"
    python3.10 -m venv "$suite/venv"
    pip=("$suite/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "setuptools<70" wheel "numpy<2"
    "${pip[@]}" "torch==2.4.1" "torchvision==0.19.1" "numpy<2"
    "${pip[@]}" --no-build-isolation "vbench==0.1.5" "pyiqa<0.1.14" "numpy<2" dreamsim scenedetect "moviepy<2"
    touch "$suite/ready-$COMMIT"
fi

mkdir -p "$folder/results"
cd "$suite/source"
export PYTHONPATH="$suite/source"
if [ "$granularity" = long ]; then
    # VBench-Long's default, without --dev_flag: consistencies are those within clips
    exec "$suite/venv/bin/python" vbench2_beta_long/eval_long.py --mode long_custom_input --videos_path "$folder" \
        --dimension "${DIMENSIONS[@]}" --output_path "$folder/results"
fi
exec "$suite/venv/bin/python" evaluate.py --mode custom_input --videos_path "$folder" \
    --prompt_file "$folder/vbench_prompts.json" --dimension "${DIMENSIONS[@]}" --output_path "$folder/results"
