"""The ground floor: what `tokenizers`, `data` and `moe` share."""
