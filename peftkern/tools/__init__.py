"""What the command line does: benchmark, plan, quantize, doctor."""
