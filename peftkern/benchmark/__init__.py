"""Measures peftkern beside the peers that a machine has: `peftkern bench`, and bench/bench_*.py.

record      what a run of `peftkern bench` writes: the JSON, field by field
tolerances  the bounds between right and wrong
timer, gpu_timer, machine   clocks, and what they ran on
suite, peers, terminal      the cases of bench/, variants in turns within one process
"""
