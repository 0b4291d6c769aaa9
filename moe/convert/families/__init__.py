"""HuggingFace model families: mapping of config keys and tensors to ours."""
