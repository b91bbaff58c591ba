"""What the process has around it: settings, files, signals, other processes. No torch."""
