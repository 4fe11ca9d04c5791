"""Implementation of the command line: adapters, benchmark, plan, quantize, doctor."""
