"""Measuring what the pipeline makes."""
