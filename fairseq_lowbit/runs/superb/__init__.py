"""SUPERB: its ten tasks by name, one after the other by s3prl, and the results in one table."""
