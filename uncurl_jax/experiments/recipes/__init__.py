"""Recipes of pruning compared on held-out text: which one to take, with evidence on other seeds."""
