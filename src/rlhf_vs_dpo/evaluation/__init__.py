"""What is measured of the samples, and how sure we are. Reads tables, loads no model, retrains nothing."""
