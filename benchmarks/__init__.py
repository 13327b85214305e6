"""Measurements that are kept with the code: each file is a command, its results lie in results/."""
