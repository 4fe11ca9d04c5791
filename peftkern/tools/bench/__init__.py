"""Benchmark of peftkern against the installed peers: `peftkern bench`, and bench/bench_*.py.

record      the JSON of a run of `peftkern bench`, field by field
command     its options, plan and files; instrument: the run; processes, worker: its processes
shapes, cases, data, providers    sizes by name, problems, their tensors, implementations
compare, terminal                 comparison with an earlier record; tables
report, report_figures, names     the HTML report, its figures, names of cases for people

timer, gpu_timer, memory, machine     timers, peak memory, description of the machine
base_layers, peers   layers as users have them, shared with the scripts of bench/
"""
