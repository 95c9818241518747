"""uncurl_jax: task-aware expert pruning of sparse mixture-of-experts language models in JAX.

Importing the package imports nothing heavy; import the module you need, for example
`uncurl_jax.pruning.plan` or `uncurl_jax.models.decoder`.
"""

__version__ = "0.1.0"
