"""Federated algorithms: one file each, registered by name."""
