"""The "cpu" back end: ops on C++ kernels and, for dense products, on torch's own GEMM.

A file per family: one function per op with the op's signature, and `refusal*`, which gives the
reason against a call or None. Sums over the rank and over rows are float32. No float32 copy of a
whole activation is made, except of float16 ones, because the NF4 kernels take float32 or bfloat16.
"""
