"""Estimators of intra-client uncertainty: one file each, registered by name."""
