"""A language model as a policy: text, models, scalar heads, log-probabilities, forward passes, generation."""
