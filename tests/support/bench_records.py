"""Records of `peftkern bench`, as small as they may be."""

from __future__ import annotations

from peftkern.tools.bench.record import FORMAT, OURS, Record


def provider(label: str, median: float | None = None, spread: float = 1.05, **more: object) -> dict:
    """A row; without a median it has no result."""
    row = {"label": label, "samples_ms": [], "error_rms": 0.0024, "error_max": 0.0055}
    row |= dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "wrong", "failed", "note"))
    row |= dict.fromkeys(("peak_bytes", "gb_s", "tflop_s", "share_of_roof"))
    if median is not None:
        low, high = median / spread, median * spread
        row |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "peak_bytes": 123456}
        row |= {"samples_ms": [low, median, high], "share_of_roof": 0.01 / median}
        row |= {"gb_s": 1e6 / median / 1e6, "tflop_s": 2e6 / median / 1e9}
    return {**row, **more}


def case(ours: dict, *others: dict, m: int | None = 16, r: int | None = 4, **more: object) -> dict:
    """The others are named by their labels; the first good one is compared with."""
    good = [row for row in others if row["wrong"] is None and row["failed"] is None]
    found = {
        **{"op": "lora_linear", "shape": "layer", "dtype": "bfloat16", "mode": "full"},
        **{"M": m, "N": 64, "K": 128, "r": r},
        **{"bytes": 10**6, "flops": 2 * 10**6, "floor_ms": 0.01},
        "against": good[0]["label"] if good else None,
        "command": f"peftkern bench --rows {m} --r {r}",
        "providers": {OURS: ours, **{row["label"]: row for row in others}},
        **more,
    }
    return {"name": f"{found['op']}/M{m}/r{r}/{found['mode']}", **found}


def record(*cases: dict, **more: object) -> Record:
    gpu = more.pop("gpu", None)
    environment = {
        **{"cpu": "Some CPU", "isa": "avx2", "isas": ["scalar", "avx2"], "gpu": gpu},
        **{"interpreter": False, "threads": 2, "last_level_cache": 1 << 25},
        **{"commit": "0123456789ab", "date": "2026-11-24T12:00:00+00:00", "python": "3.11.7"},
        "versions": {"torch": "2.13.0", "peftkern": "0.1.0", "triton": None},
        "load_average": [0.1, 0.2, 0.3],
        "variables": {"OMP_NUM_THREADS": "2"},
    }
    return {
        "format": FORMAT,
        "command": "peftkern bench --budget 9s",
        "device": "cuda" if gpu else "cpu",
        **{"seed": 0, "budget_s": 9.0, "elapsed_s": 8.5},
        "environment": environment,
        "roof": {"copy": 2e10, "bfloat16": 2e12},
        **{"cases": list(cases), "not_reached": [], "not_installed": {}},
        **more,
    }
