"""The settings: one module a group, and what follows from them by arithmetic."""
