"""Speed and memory, measured as ratios to a plain loop within one interleaved run."""
