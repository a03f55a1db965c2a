"""Metrics of any video: decoded once as a stream, measured by all chosen metrics, kept in one tidy table.

protocol.py  what a metric is
catalogue.py all by name
table.py     the tidy table: `Row`, `read_table`, `append`
videos.py    which videos, and what is known of each: method, prompt, seed, chunk layout
measuring.py one pass over a video for all metrics; the loop over videos
The other modules are metrics.
"""
