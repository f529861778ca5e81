"""Triton kernels. Nothing outside this package imports them before they are needed."""
