"""Estimators of inter-client uncertainty: one file each, registered by name."""
