"""What several passes look for: decomposed operators, constants beside them, tensors that can stand for others."""
