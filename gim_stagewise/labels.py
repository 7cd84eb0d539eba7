"""What sources, caches and objectives have to agree on about labels."""

# Of a sample, or a step of one, that has none; no classifier looks at it.
NO_LABEL = -1
