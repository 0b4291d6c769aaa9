"""One module a model family of HuggingFace."""
