"""Implementation of the command line: benchmark, plan, quantize, doctor."""
