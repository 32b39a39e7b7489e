"""Data sets (one file each), their Arrow store, partitions over clients, and splits."""
