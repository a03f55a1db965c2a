"""Sweeps: methods x settings x prompts x seeds x lengths, from one YAML to videos, rows, tables, figures and a page.

    python -m evaluation sweep evaluation/sweeps/tiny.yaml --output_folder outputs/tiny
    torchrun --nproc_per_node=8 -m evaluation sweep ...      # and the same command again after any interruption
    python -m evaluation sweep ... --ray auto --workers 16   # the same sweep on a Ray cluster
    python -m evaluation report outputs/tiny                 # tables, figures, index.html

The folder is the only thing that workers share: every piece of work is claimed by a lock that ends with its process,
and every result is written whole or not at all. Any number of workers may come, go and be killed.

    settings   what a sweep is: its YAML, typed and checked; the variants that it stands for
    work       claims, and the loop that every worker runs
    make       videos that are missing
    measure    rows that are missing, by evaluation.metrics
    record     what attention sees and selection keeps, watched from outside
    workers    this process, torchrun's ranks, or tasks on Ray
    results    the folder: the tidy table, the record of how it came about
    numbers, tables, quoted, figures, recorded, page   from the tidy table to what people read

A study (evaluation.study) stays beside it: it measures the embedded model against the world it was trained on, in
memory, where a sweep measures files. Both share statistics, methods and analysers.
"""
