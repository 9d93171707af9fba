"""What people look at: the console, the metrics log and the report."""
