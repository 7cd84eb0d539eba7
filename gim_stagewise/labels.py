"""What sources and objectives have to agree on about labels."""

# Of a step that has no label, which no classifier looks at.
NO_LABEL = -1
