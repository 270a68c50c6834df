"""Every method tuned alike: which settings are tried, what a trial is worth, and what a search costs."""
