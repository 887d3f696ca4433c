"""A graph made to work at another resolution: the input is made smaller, and all that hangs on its size is mended.

``scaling`` edits a graph; ``walk`` follows the sizes of all tensors through it, with a rule for each operator.
"""
