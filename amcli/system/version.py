"""The version of this package, for code that needs nothing else."""

VERSION = "0.1.0"
