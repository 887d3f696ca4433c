"""Prune depth, width and resolution of an ONNX graph together, by what a few pruned networks tell."""
