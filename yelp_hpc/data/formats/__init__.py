"""One reader a format of data files: records, one at a time."""
