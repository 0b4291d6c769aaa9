"""Commands: each module has ``main()``, which reads the command line and returns an exit code."""
