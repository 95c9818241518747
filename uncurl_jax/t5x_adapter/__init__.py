"""T5X as a runner of our models: model, partitioner, tasks, checkpoints and the launcher.

T5X is on no package index, so it is optional: `availability.make_importable` finds it, and nothing
outside this package and the command line knows of it. See docs/t5x.md.
"""
