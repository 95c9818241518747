"""Slices of TPUs: where a model goes on them, whether it fits, and what it costs to run."""
