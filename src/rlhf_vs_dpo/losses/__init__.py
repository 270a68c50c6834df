"""One file per paper: each loss is a pure function of log-probabilities, beside its equation. Imports torch only."""
