"""Tables, plots and the record of a run."""
