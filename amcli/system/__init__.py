"""The process's surroundings: settings, files, signals, other processes. No torch."""
