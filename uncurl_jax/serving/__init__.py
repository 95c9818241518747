"""The HTTP server over an exported artifact, and what it learns from live traffic."""
