"""What commands share: a job and its compiled step, the loop, and what a run writes."""
