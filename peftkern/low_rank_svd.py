"""Alias of `peftkern.functional.low_rank_svd`."""

import sys

from peftkern.functional import low_rank_svd

sys.modules[__name__] = low_rank_svd
