"""The statistics of the gate."""

MIN_CLUSTERS = 10  # no SWAP on fewer: variances from fewer clusters say too little
