"""Alias of `peftkern.layers.dora`."""

import sys

from peftkern.layers import dora

sys.modules[__name__] = dora
