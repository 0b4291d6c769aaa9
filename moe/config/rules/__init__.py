"""The cross-checks, one module a subject; each yields a line for every rule that is broken."""
