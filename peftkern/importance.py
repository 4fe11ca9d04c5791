"""Alias of `peftkern.functional.adalora`."""

import sys

from peftkern.functional import adalora

sys.modules[__name__] = adalora
