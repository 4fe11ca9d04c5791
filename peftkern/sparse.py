"""Alias of `peftkern.functional.rosa`."""

import sys

from peftkern.functional import rosa

sys.modules[__name__] = rosa
