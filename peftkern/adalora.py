"""Alias of `peftkern.methods.adalora`."""

import sys

from peftkern.methods import adalora

sys.modules[__name__] = adalora
