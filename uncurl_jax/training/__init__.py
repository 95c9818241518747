"""One optimizer step, and the loop that turns a token cache into a checkpoint."""
