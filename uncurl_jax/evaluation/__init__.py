"""Calibration, rank classification, generation and the loss of a checkpoint on a task."""
