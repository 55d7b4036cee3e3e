"""Hard negatives of records, found by a model: the search, the rules and the report."""
