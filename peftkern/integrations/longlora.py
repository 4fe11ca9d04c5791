"""Alias of `peftkern.integrations.transformers.longlora`."""

import sys

from peftkern.integrations.transformers import longlora

sys.modules[__name__] = longlora
