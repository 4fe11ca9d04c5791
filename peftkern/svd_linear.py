"""Alias of `peftkern.layers.svd`."""

import sys

from peftkern.layers import svd

sys.modules[__name__] = svd
