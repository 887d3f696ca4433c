"""Linear operators found in a graph, priced, and put back as fewer: what the folding and merging passes share."""
