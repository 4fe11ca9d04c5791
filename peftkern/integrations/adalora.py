"""Alias of `peftkern.integrations.peft.adalora`."""

import sys

from peftkern.integrations.peft import adalora

sys.modules[__name__] = adalora
