# Sourced by the scripts of the top level: makes or reuses a virtual environment and sets $PYTHON; runs inference.
#
#   PYTHON=/path/to/python   use this interpreter as it is, install nothing
#   VENV=folder              where the environment lives (default: .venv beside the scripts)
#
# Needs Python 3.11+ with pip and venv. A requirements file is installed once, and again when it changes.

environment() {  # environment REQUIREMENTS_FILE...
    local root found="" candidate file stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    CALLED_FROM="$PWD"
    cd "$root"
    if [ -n "${PYTHON:-}" ]; then
        return
    fi
    VENV="${VENV:-.venv}"
    case "$VENV" in /*) ;; *) VENV="$root/$VENV" ;; esac
    PYTHON="$VENV/bin/python"
    if [ ! -x "$PYTHON" ]; then
        for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
            if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                found="$candidate"
                break
            fi
        done
        if [ -z "$found" ]; then
            echo "error: no Python 3.11 or newer with venv and pip was found; install one (for example: apt install python3 python3-venv)." >&2
            exit 2
        fi
        "$found" -m venv "$VENV"
    fi
    for file in "$@"; do
        stamp="$VENV/installed-${file//\//-}"
        if ! cmp -s "$file" "$stamp"; then
            echo "Installing $file into $VENV (once)" >&2
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$file"
            cp "$file" "$stamp"
        fi
    done
}

minute_of_video() {  # minute_of_video METHOD ARGUMENT...   configs/METHOD.yaml -> videos/METHOD, a minute for each prompt
    local method="$1" argument root="$PWD"
    local length=(--seconds 60)
    shift
    for argument in "$@"; do
        case "$argument" in --num_output_frames*) length=() ;; esac
    done
    cd "$CALLED_FROM"  # paths among the arguments are the caller's
    exec "$PYTHON" "$root/inference.py" --config_path "$root/configs/$method.yaml" ${length[@]+"${length[@]}"} --use_ema \
        --output_folder "$root/videos/$method" "$@"
}
