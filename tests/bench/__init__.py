"""Time and memory of the product beside real Anomalib: make bench."""
