"""Measures peftkern beside the peers that a machine has: `peftkern bench`, and bench/bench_*.py.

record      what a run of `peftkern bench` writes: the JSON, field by field
command     its options, its plan, its files; instrument: the run; processes, worker: who runs what
shapes, cases, data, providers    sizes by name, problems, their numbers, who solves them
compare, terminal                 a record beside an earlier one; for the eye
report, report_figures, report_style   the HTML report; charts, markup: its SVG, its escaping

tolerances  the bounds between right and wrong, which the tests share
timer, gpu_timer, memory, machine     clocks, peaks, and what they ran on
suite, peers                          the scripts of bench/: variants in turns within one process
"""
