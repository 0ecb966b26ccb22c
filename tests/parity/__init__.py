"""Is our training Anomalib's? Both sides run on the same images, and their numbers are compared."""
