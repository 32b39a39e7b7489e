"""Tests of the analysis scripts."""
