"""Ops on tensors: encode, select, decode, loss, weight_grad, each as torch reference, Triton kernels and a cost model."""
