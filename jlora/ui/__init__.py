"""Console output, the metrics log and the HTML report."""
