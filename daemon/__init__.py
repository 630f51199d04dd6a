"""Keeps the processes alive: configuration, forking, signals, exit codes. Imported by nobody else."""
