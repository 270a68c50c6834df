"""Who prefers what: the gold reward, the simulated annotator, labelling, judges."""
