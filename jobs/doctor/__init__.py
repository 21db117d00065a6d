"""What would go wrong, said before a job waits for it: `yelp_hpc doctor`."""
