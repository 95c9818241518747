"""Tasks, vocabularies, metrics and token caches; needs neither JAX nor TensorFlow."""
