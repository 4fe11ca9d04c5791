"""Alias of `peftkern.formats.nf4`."""

import sys

from peftkern.formats import nf4

sys.modules[__name__] = nf4
