"""Ops on tensors, one folder each: encode, encode_sparse, select, decode, loss, weight_grad, adam.

A folder holds the op itself (`__init__.py`), plain torch (`reference.py`), Triton kernels (`triton.py`), and what bench
compiles, tunes and times (`bench.py`). `autograd.py` makes ops differentiable for the engine and `ops.py` for users.
Both take their gradients from `gradients.py`. `configs.py` holds everything that depends on the GPU.
"""
