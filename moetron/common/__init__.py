"""Code that `tokenizers`, `data` and `moe` share."""
