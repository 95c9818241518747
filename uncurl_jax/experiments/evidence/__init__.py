"""What the runs of a study show: answers, paired intervals, thresholds, effects."""
