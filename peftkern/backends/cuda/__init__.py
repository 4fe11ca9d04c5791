"""The "cuda" back end: ops on CUDA C++ kernels, where they need what Triton does not give.

A file per family: one function per op with the op's signature, and `refusal*`, which gives the
reason against a call or None.
"""
