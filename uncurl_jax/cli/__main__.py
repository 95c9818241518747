"""`python -m uncurl_jax.cli` is `uncurl`."""

import sys

from uncurl_jax.cli import main

sys.exit(main())
