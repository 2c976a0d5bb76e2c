"""The idea of the paper: which step gets which credit. Needs torch, numpy and jaxtyping, nothing else."""
