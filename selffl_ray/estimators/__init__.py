"""Estimators of the two uncertainties: ``intra`` within a client, ``inter`` between clients."""
