"""Codebook weights: product quantization of the linear operators of a graph (Stock et al. 2020)."""
