"""Model families of HuggingFace: their keys and tensors in ours."""
