"""Answers of a model for rows of a test set, in shards that any process can finish."""
