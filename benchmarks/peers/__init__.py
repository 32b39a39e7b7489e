"""Other systems on the same workloads: a script each, run in an environment that has them."""
