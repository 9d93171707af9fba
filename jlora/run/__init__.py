"""What the commands share: a job, its compiled training step, the loop, and what a run writes."""
