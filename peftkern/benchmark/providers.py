"""Alias of `peftkern.tools.bench.providers`."""

import sys

from peftkern.tools.bench import providers

sys.modules[__name__] = providers
