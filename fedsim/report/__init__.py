"""What a person reads of finished runs: a page, tables for a paper, and the difference of two runs."""
