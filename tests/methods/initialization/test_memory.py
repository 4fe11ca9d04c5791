"""No method that starts from a weight makes it dense in float32."""

from __future__ import annotations

import json

from processes import run_code

PEAKS = """
import json, resource
import torch
from peftkern.methods.initialization.factors import olora, pissa, subtract_update_
from peftkern.methods.initialization.loftq import Storage, loftq, qpissa, relative_error

def start(weight):
    subtract_update_(weight, *pissa(weight, 8, 1.0)[:2], 1.0)
    subtract_update_(weight, *olora(weight, 8)[:2], 1.0)
    for method, options in ((qpissa, {}), (loftq, {"steps": 1})):
        factors, base = method(weight, 8, 1.0, Storage(), **options)
        relative_error(weight, base, factors, 1.0)

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

start(torch.randn(640, 640).bfloat16())
big = torch.empty(4096, 4096, dtype=torch.bfloat16)
for rows in big.split(256):
    rows.copy_(torch.randn(rows.shape))
before = peak()
start(big)
print(json.dumps({"grown": peak() - before, "dense": 4 * big.numel()}))
"""


def test_peak_is_below_a_dense_copy():
    found = json.loads(run_code(PEAKS))
    assert found["grown"] < 0.75 * found["dense"]
