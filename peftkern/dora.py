"""Alias of `peftkern.functional.dora`."""

import sys

from peftkern.functional import dora

sys.modules[__name__] = dora
