"""Models for serving: programs and weights that run without this package."""
