"""Tests through the real command line, on a CPU, with a small random model."""
