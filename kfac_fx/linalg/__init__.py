"""Structured matrices of curvature blocks. Tensors only; every function also traces."""
