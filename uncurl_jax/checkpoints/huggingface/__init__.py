"""Hugging Face checkpoint directories: reading, writing, and which model families are known."""
