"""The version of this package, for whoever needs no more than that."""

VERSION = "0.1.0"
