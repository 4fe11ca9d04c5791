"""Alias of `peftkern.layers.nf4`."""

import sys

from peftkern.layers import nf4

sys.modules[__name__] = nf4
