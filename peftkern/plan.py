"""Alias of `peftkern.tools.plan.plan`."""

import sys

from peftkern.tools.plan import plan

sys.modules[__name__] = plan
