"""Alias of `peftkern.integrations.peft.bitsandbytes`."""

import sys

from peftkern.integrations.peft import bitsandbytes

sys.modules[__name__] = bitsandbytes
