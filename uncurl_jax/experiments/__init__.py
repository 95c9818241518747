"""Studies: running them, resuming them, and the report of what they found."""
