"""Clients of torch: the trainable twin of a graph, the training loop, export. Only the command line imports them."""
