"""Detection of bad numbers, diverged replicas and sick experts, and what follows from them."""
