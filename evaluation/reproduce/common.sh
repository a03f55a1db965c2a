# Sourced by the scripts beside it: sets up, makes and measures what a table or figure needs, writes the report.
#
#   WORKERS=N        processes that share the work (default: one a GPU, or one a CPU core)
#   LIMIT_S=SECONDS  stop after so long; the same command goes on from there (default: no limit)
#   PYTHON, VENV     as in utils/environment.sh
#
# Exit status: 0 done, 1 something failed, 2 bad input, 124 the limit was reached.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../utils/environment.sh"
environment requirements.txt evaluation/requirements.txt
PROCESSORS="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)"  # which would count threads where those are set
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

reproduce() {  # reproduce SWEEP FOLDER ARGUMENT...   evaluation/sweeps/SWEEP.yaml -> outputs/FOLDER, its report
    local sweep="$1" folder="outputs/$2" status=0 gpus
    shift 2
    gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    WORKERS="${WORKERS:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo "$PROCESSORS")}"
    # Else each worker starts as many compilers as there are processors.
    export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-$(((PROCESSORS + WORKERS - 1) / WORKERS))}"
    set -- sweep "evaluation/sweeps/$sweep.yaml" --output_folder "$folder" "$@"
    "$PYTHON" -m evaluation "$@" --dry_run || return  # torchrun would tell bad input as a failure
    ${LIMIT_S:+timeout --kill-after=45 "$LIMIT_S"} \
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$WORKERS" -m evaluation "$@" || status=$?
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        echo "stopped after $LIMIT_S s; the same command goes on from here" >&2
        return 124
    fi
    [ "$status" -le 1 ] || return "$status"
    "$PYTHON" -m evaluation report "$folder" || return
    return "$status"
}
