"""Studies of the embedded model: many captions, many cache policies, the same noise; rows, tables, curves, sheets.

    python -m evaluation.study run evaluation/studies/drift_60s.yaml --output_folder outputs/drift_60s
    python -m evaluation.study report outputs/drift_60s
    python -m evaluation.study sheet outputs/drift_60s

A row is one video of one method for one caption, one JSON line in `<output>/<method>.jsonl`. Rows that are there are
not made again, so a stopped run goes on, and more captions or methods may join later.

    settings   what a study is: its YAML, typed and checked
    sources    what makes the videos: the model under a policy, the renderer, the autoencoder
    scores     from a video and its caption to a row, and from rows to shares
    readers    processes that score finished videos while the next ones are made
    results    the output folder
    run        all of them together
    statistics, compare, report, plots, sheet    from rows to what people read
"""
