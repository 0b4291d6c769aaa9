"""Cross-checks of settings by subject; each yields a line per broken rule."""
