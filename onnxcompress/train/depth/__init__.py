"""Depth pruning: blocks that become one operator (Liu et al., UPDP, AAAI 2024)."""
