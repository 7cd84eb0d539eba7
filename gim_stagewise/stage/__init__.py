"""One stage: load, train, freeze, extract."""
