"""The commands of `python -m evaluation`, one module each; heavy imports belong inside their `run`."""
