"""What `from yelp_hpc import …` gives: a classifier, a run, a submission. Nothing heavy."""
