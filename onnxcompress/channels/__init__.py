"""Channels of a graph: which of them go together, what goes with them, and pruning by width.

groups.py finds them, removing.py takes them out, ranking.py ranks them, allocation.py spends a budget,
compensation.py lets the weights that stay make up for those that go, pruning.py is all of it on a file.
"""
