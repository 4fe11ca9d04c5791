"""Benchmark of peftkern against the installed peers: `peftkern bench`, and bench/bench_*.py.

record      the JSON of a run of `peftkern bench`, field by field
command     its options, plan and files; runner: the loop over cases, shared with bench/
instrument  the run in processes of their own; processes, nursery, worker: these
shapes, cases, data, providers    sizes by name, problems, their tensors, implementations
compare, terminal                 comparison with an earlier record; tables
report, report_figures, names     the HTML report, its figures, names of cases for people

timer, gpu_timer, memory, machine     timers, peak memory, description of the machine
base_layers, peers   layers as users have them, shared with the scripts of bench/
"""
